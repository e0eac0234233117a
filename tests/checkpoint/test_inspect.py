import pytest
import torch
from safetensors.torch import save_file

from llmc_attnmask.checkpoint.inspect import LayerInfo, inspect
from llmc_attnmask.checkpoint.layouts import sparse_bitmask
from llmc_attnmask.checkpoint.layouts.sparse_24_bitmask import pack
from llmc_attnmask.oneshot.shipped import MODEL_DIR


def test_a_checkpoint_is_described_layer_by_layer(tmp_path):
    two_of_four = torch.tensor([[1.0, 0, 0, 2, 3, 4, 0, 0]])
    unstructured = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0]])
    save_file(
        {
            "a.q_proj.weight": two_of_four.bfloat16(),
            "a.k_proj.weight": unstructured.to(torch.float8_e4m3fn),
            "a.v_proj.weight_packed": torch.ones(2, 3, dtype=torch.int32),
            "a.norm.weight": torch.ones(4),
            "a.odd.weight": torch.zeros(2, 3),
        },
        tmp_path / "model.safetensors",
    )
    found = {layer.name: layer for layer in inspect(tmp_path)}
    assert set(found) == {"a.q_proj", "a.k_proj", "a.v_proj", "a.odd"}
    q, k, v = found["a.q_proj"], found["a.k_proj"], found["a.v_proj"]
    assert (q.format, q.sparsity, q.two_of_four, q.bytes) == ("bfloat16", 0.5, True, 16)
    assert (k.format, k.sparsity, k.two_of_four) == ("float8_e4m3fn", 0.625, False)
    assert (v.format, v.sparsity, v.two_of_four) == ("packed", None, None)
    # three columns do not form a group of four
    assert found["a.odd"].two_of_four is False


def test_a_packed_layer_is_described_by_its_contents(tmp_path):
    weight = torch.tensor([[1.0, 0, 0, 2, 3, 0, 0, 0]], dtype=torch.bfloat16)
    tensors = {f"a.q_proj.{k}": v for k, v in pack(weight)._asdict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (layer,) = inspect(tmp_path)
    assert layer == LayerInfo(
        name="a.q_proj",
        format="bfloat16 sparse-24-bitmask",
        shape=(1, 8),
        sparsity=0.625,
        two_of_four=True,
        bytes=8 + 1 + 16,
    )
    tensors["a.q_proj.bitmask"].fill_(7)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a\.q_proj in .* exactly two bits"):
        inspect(tmp_path)


def test_the_shipped_model_is_dense():
    layers = inspect(MODEL_DIR)
    assert len(layers) == 4 * 7 + 1
    assert all(layer.sparsity < 0.01 and not layer.two_of_four for layer in layers)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors file"):
        inspect(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    content = (MODEL_DIR / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable"):
        inspect(tmp_path)


def test_a_layer_packed_with_any_mask_is_described_by_its_contents(tmp_path):
    weight = torch.tensor([[1.0, 0, 2, 2, 3, 0, 0, 0]], dtype=torch.bfloat16)
    tensors = {}
    for name, rows in (("a.q_proj", weight), ("a.k_proj", weight[:, 4:])):
        parts = sparse_bitmask.pack(rows)._asdict()
        tensors |= {f"{name}.{kind}": part for kind, part in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    k, q = sorted(inspect(tmp_path), key=lambda layer: layer.name)
    assert q == LayerInfo(
        name="a.q_proj",
        format="bfloat16 sparse-bitmask",
        shape=(1, 8),
        sparsity=0.5,
        two_of_four=False,
        bytes=8 + 1 + 16 + 8,
    )
    assert k.two_of_four and k.sparsity == 0.75
    tensors["a.q_proj.row_offsets"].fill_(7)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a\.q_proj in .* starts at value 7"):
        inspect(tmp_path)
