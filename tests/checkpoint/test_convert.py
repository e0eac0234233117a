"""Converting there and back: tensors, config, index and what lies beside them."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc_attnmask.checkpoint import layout, marker, transfer
from llmc_attnmask.checkpoint.convert import CheckpointWarning, to_dense, to_packed
from tests.support.checkpoints import (
    NAMES,
    Q,
    config_of,
    decoder,
    digests,
    read,
    two_of_four,
    write,
)

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn],
)
def test_a_round_trip_restores_the_sha256_of_every_tensor(tmp_path, shards, dtype):
    dense = write(tmp_path / "dense", decoder(dtype), shards)
    packed = to_packed(dense, tmp_path / "packed")
    assert sorted(packed.layers) == sorted(NAMES)
    restored = to_dense(tmp_path / "packed", tmp_path / "restored")
    assert digests(tmp_path / "restored") == digests(dense)
    assert set(restored.layers) == set(NAMES)
    assert restored.bytes_after == packed.bytes_before
    assert restored.bytes_before == packed.bytes_after
    for folder in ("packed", "restored"):
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert names == {path.name for path in dense.iterdir()}
        assert (tmp_path / folder / "tokenizer.json").read_text() == '{"tokens": []}'


@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 7),
    dtype=st.sampled_from([torch.bfloat16, torch.int8, torch.float32]),
    shards=st.integers(1, 3),
    layers=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_round_trips_work_for_any_shape_and_sharding(
    tmp_path_factory, rows, groups, dtype, shards, layers, seed
):
    folder = tmp_path_factory.mktemp("any")
    tensors = {
        f"h.{i}.fc.weight": two_of_four(rows, 4 * groups, dtype, seed + i)
        for i in range(layers)
    }
    tensors |= {"norm.weight": torch.ones(3), "wte.weight": torch.ones(2, 5)}
    dense = write(folder / "dense", tensors, shards)
    to_packed(dense, folder / "packed")
    to_dense(folder / "packed", folder / "restored")
    assert digests(folder / "restored") == digests(dense)


def test_packed_tensors_follow_the_layout(tmp_path):
    dense = write(tmp_path / "dense", decoder())
    to_packed(dense, tmp_path / "packed")
    tensors = read(tmp_path / "packed")
    for name in NAMES:
        expected = layout.pack(read(dense)[f"{name}.weight"])
        for kind, value in expected._asdict().items():
            assert torch.equal(tensors.pop(f"{name}.{kind}"), value)
    assert set(tensors) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
    }


def test_an_unquantized_packed_checkpoint_has_only_a_sparsity_config(tmp_path):
    dense = write(tmp_path / "dense", decoder(), shards=2)
    to_packed(dense, tmp_path / "packed")
    config = config_of(tmp_path / "packed")
    quantization = config.pop("quantization_config")
    assert config == {"model_type": "llama"}
    assert set(quantization) == {"quant_method", "version", "sparsity_config"}
    sparsity = quantization["sparsity_config"]
    assert 0 < sparsity.pop("global_sparsity") < 0.5
    assert sorted(sparsity.pop("targets")) == sorted(NAMES)
    assert sparsity == {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "ignore": [],
        "registry_requires_subclass": False,
    }
    to_dense(tmp_path / "packed", tmp_path / "restored")
    config = config_of(tmp_path / "restored")
    assert sorted(marker.read(config)) == sorted(NAMES)
    assert "quantization_config" not in config


def test_a_quantization_config_keeps_its_contents(tmp_path):
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "version": "0.19.0",
        "config_groups": {"group_0": {"targets": ["Linear"]}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "sparsity_config": {},
    }
    config = {"quantization_config": quantization}
    marker.write(config, [*NAMES, "model.layers.9.other"])
    dense = write(tmp_path / "dense", decoder(torch.int8), config=config)
    to_packed(dense, tmp_path / "packed")
    packed = config_of(tmp_path / "packed")
    assert marker.read(packed) == ["model.layers.9.other"]
    sparsity = packed["quantization_config"].pop("sparsity_config")
    assert sparsity["format"] == "sparse-24-bitmask"
    quantization.pop("sparsity_config")
    assert packed["quantization_config"] == quantization
    to_dense(tmp_path / "packed", tmp_path / "restored")
    restored = config_of(tmp_path / "restored")
    assert restored["quantization_config"] == quantization
    assert set(marker.read(restored)) == {*NAMES, "model.layers.9.other"}


def test_the_index_names_the_tensors_of_the_shards(tmp_path):
    dense = write(tmp_path / "dense", decoder(), shards=3)
    to_packed(dense, tmp_path / "packed")
    to_dense(tmp_path / "packed", tmp_path / "restored")
    for folder in ("packed", "restored"):
        file = tmp_path / folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        tensors = read(tmp_path / folder)
        assert set(index["weight_map"]) == set(tensors)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert index["metadata"] == {"total_size": size, "total_parameters": 7}


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 0.5625), (torch.int8, 0.625)]
)
def test_packed_weights_take_the_documented_share_of_the_disk(tmp_path, dtype, share):
    tensors = {"layers.0.up_proj.weight": two_of_four(256, 512, dtype)}
    dense = write(tmp_path / "dense", tensors)
    to_packed(dense, tmp_path / "packed")
    before, after = (
        (tmp_path / folder / "model.safetensors").stat().st_size
        for folder in ("dense", "packed")
    )
    assert share <= after / before <= share * 1.01


def test_parts_in_different_shards_are_found(tmp_path):
    packed = layout.pack(two_of_four(4, 8))
    parts = {f"h.0.fc.{kind}": value for kind, value in packed._asdict().items()}
    sparsity = {"format": "sparse-24-bitmask", "targets": ["h.0.fc"]}
    config = {"quantization_config": {"sparsity_config": sparsity}}
    folder = write(tmp_path / "packed", parts, shards=3, config=config)
    to_dense(folder, tmp_path / "restored")
    (weight,) = read(tmp_path / "restored").values()
    assert torch.equal(weight, two_of_four(4, 8))


def test_subfolders_are_copied_and_hidden_files_are_not(tmp_path):
    dense = write(tmp_path / "dense", decoder())
    (dense / "code").mkdir()
    (dense / "code" / "model.py").write_text("x = 1")
    (dense / ".cache").mkdir()
    to_packed(dense, tmp_path / "packed")
    assert (tmp_path / "packed" / "code" / "model.py").read_text() == "x = 1"
    assert not (tmp_path / "packed" / ".cache").exists()


@pytest.mark.parametrize("kind", ["empty", "link", "dangling link", "here"])
def test_an_output_that_is_empty_or_a_link_is_filled(tmp_path, monkeypatch, kind):
    source = write(tmp_path / "in", decoder())
    output = target = tmp_path / "out"
    if kind.endswith("link"):
        target = tmp_path / "elsewhere"
        output.symlink_to(target)
    if kind != "dangling link":
        target.mkdir()
    if kind == "here":
        monkeypatch.chdir(output)
        output = Path()
    # a disk may be mounted there, which can be filled but not replaced
    monkeypatch.setattr(Path, "rmdir", lambda _: pytest.fail("removed"))
    to_packed(source, output)
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in target.iterdir()) == names
    assert len(list(tmp_path.iterdir())) == (3 if "link" in kind else 2)


def test_a_matrix_without_entries_survives_a_round_trip(tmp_path):
    empty = {f"{Q}.weight": torch.empty(0, 8).bfloat16()}
    source = write(tmp_path / "in", decoder() | empty)
    with pytest.warns(CheckpointWarning, match="stay dense"):
        to_packed(source, tmp_path / "packed")
    to_dense(tmp_path / "packed", tmp_path / "out")
    assert digests(source) == digests(tmp_path / "out")


def test_an_output_that_is_not_empty_is_left_alone(tmp_path):
    dense = write(tmp_path / "dense", decoder())
    before = digests(dense)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        to_packed(dense, dense)
    assert digests(dense) == before


@pytest.mark.parametrize("how", ["error", "interrupt"])
def test_a_failure_halfway_leaves_nothing(tmp_path, monkeypatch, how):
    dense = write(tmp_path / "dense", decoder(), shards=2)
    error = OSError(28, "No space left on device") if how == "error" else None
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 20:
            raise error or KeyboardInterrupt
        return original(*arguments)

    original = transfer.ShardWriter.write
    monkeypatch.setattr(transfer.ShardWriter, "write", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError if error else KeyboardInterrupt):
        to_packed(dense, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out"}
