import pytest
import torch

from llmc_attnmask.checkpoint.convert import to_packed
from llmc_attnmask.checkpoint.io.files import open_checkpoint
from llmc_attnmask.serving.bench.groups import groups
from llmc_attnmask.serving.recognise import Sparsity
from tests.support.checkpoints import decoder, write


def test_layers_are_fused_as_servers_do_and_alike_ones_are_one_group(tmp_path):
    found, experts = groups(
        open_checkpoint(write(tmp_path / "dense", decoder())), Sparsity()
    )
    assert not experts
    described = {(g.kind, g.rows, g.columns, len(g.names)) for g in found}
    assert described == {
        ("q_proj+k_proj+v_proj", 32, 16, 2),
        ("o_proj", 16, 16, 2),
        ("gate_proj+up_proj", 64, 16, 2),
        ("down_proj", 16, 32, 2),
    }
    assert all(group.zeros == 0.5 for group in found)
    qkv = next(group for group in found if group.rows == 32)
    assert qkv.names == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert qkv.dense_bytes == 2 * 32 * 16


@pytest.mark.parametrize("storage", ["dense", "sparse-bitmask", "sparse-24-bitmask"])
def test_layers_of_other_densities_are_another_group(tmp_path, storage):
    tensors = decoder()
    tensors["model.layers.1.mlp.down_proj.weight"][:, :12] = 0
    folder = write(tmp_path / "dense", tensors)
    if storage != "dense":
        to_packed(folder, tmp_path / "packed", storage=storage)
        folder = tmp_path / "packed"
    found, _ = groups(open_checkpoint(folder), Sparsity())
    zeros = sorted(group.zeros for group in found if group.kind == "down_proj")
    if storage == "sparse-24-bitmask":  # which has two values of every four
        assert zeros == [0.5]
    else:
        assert zeros == [0.5, pytest.approx(1 - 10 / 32, abs=0.001)]


def test_experts_are_left_out(tmp_path):
    name = "model.layers.0.mlp.experts.{}.up_proj"
    tensors = decoder(layers=1)
    for i in range(3):
        tensors[f"{name.format(i)}.weight"] = torch.ones(4, 16)
    found, experts = groups(
        open_checkpoint(write(tmp_path / "dense", tensors)), Sparsity()
    )
    assert experts == [name.format(i) for i in range(3)]
    assert len(found) == 4


def test_layers_of_another_structure_or_storage_are_another_group(tmp_path):
    folder = write(tmp_path / "dense", decoder(layers=3))
    checkpoint = open_checkpoint(folder)
    name = "model.layers.{}.mlp.down_proj"
    said = Sparsity(
        two_of_four=(name.format(0), name.format(1)), unstructured=(name.format(2),)
    )
    found, _ = groups(checkpoint, said)
    down = [group for group in found if group.kind == "down_proj"]
    assert [len(group.names) for group in down] == [2, 1]


def test_densities_that_differ_a_little_are_one_group_wherever_they_lie(tmp_path):
    tensors = decoder()
    for layer, zeros in ((0, 294), (1, 296)):  # 0.574 and 0.578 of 512
        weight = torch.ones(16, 32)
        weight.view(-1)[:zeros] = 0
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = weight.bfloat16()
    found, _ = groups(open_checkpoint(write(tmp_path / "d", tensors)), Sparsity())
    assert [len(g.names) for g in found if g.kind == "down_proj"] == [2]


def test_fused_layers_with_different_inputs_are_refused(tmp_path):
    tensors = decoder()
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.ones(8, 8)
    with pytest.raises(
        ValueError, match=r"k_proj \[8, 8\].* the same number of inputs"
    ):
        groups(open_checkpoint(write(tmp_path / "d", tensors)), Sparsity())
