import pytest
import torch

from llmc_attnmask.checkpoint.convert import to_packed
from llmc_attnmask.checkpoint.io.files import open_checkpoint
from llmc_attnmask.serving.bench.groups import groups
from tests.support.checkpoints import decoder, write


def test_layers_are_fused_as_servers_do_and_alike_ones_are_one_group(tmp_path):
    found, experts = groups(open_checkpoint(write(tmp_path / "dense", decoder())))
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
    found, _ = groups(open_checkpoint(folder))
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
    found, experts = groups(open_checkpoint(write(tmp_path / "dense", tensors)))
    assert experts == [name.format(i) for i in range(3)]
    assert len(found) == 4
