"""Converting there and back: tensors, config, index and what lies beside them."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.checkpoint.convert import to_dense, to_packed
from llmc_attnmask.checkpoint.io.writer import ShardWriter
from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask, sparse_bitmask
from llmc_attnmask.checkpoint.selection import CheckpointWarning
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


@pytest.mark.parametrize("storage", ["sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn],
)
def test_a_round_trip_restores_the_sha256_of_every_tensor(
    tmp_path, shards, dtype, storage
):
    dense = write(tmp_path / "dense", decoder(dtype), shards)
    packed = to_packed(dense, tmp_path / "packed", storage=storage)
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


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    dtype=st.sampled_from([torch.bfloat16, torch.int8, torch.float32]),
    density=st.sampled_from([0, 0.01, 0.5, 0.875]),
    shards=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_mask_survives_a_round_trip(
    tmp_path_factory, shape, dtype, density, shards, seed
):
    folder = tmp_path_factory.mktemp("any")
    random = torch.Generator().manual_seed(seed)
    tensors = {"norm.weight": torch.ones(3)}
    for i in range(3):
        weight = torch.randint(1, 100, shape, generator=random)
        rank = torch.rand(weight.numel(), generator=random).argsort().view(shape)
        weight[rank >= int(density * weight.numel())] = 0
        tensors[f"h.{i}.fc.weight"] = weight.to(dtype)
    dense = write(folder / "dense", tensors, shards)
    packed = to_packed(dense, folder / "packed", storage="sparse-bitmask")
    assert len(packed.layers) == 3
    to_dense(folder / "packed", folder / "restored")
    assert digests(folder / "restored") == digests(dense)


@pytest.mark.parametrize("layout", [sparse_24_bitmask, sparse_bitmask])
def test_packed_tensors_follow_the_layout(tmp_path, layout):
    dense = write(tmp_path / "dense", decoder())
    to_packed(dense, tmp_path / "packed", storage=layout.NAME)
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


def test_a_checkpoint_packed_with_any_mask_still_says_what_is_2of4(tmp_path):
    tensors = decoder()
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"][:, :6] = 0
    tensors[f"{name}.weight"][:, 6:10] = 1
    dense = write(tmp_path / "dense", tensors)
    to_packed(dense, tmp_path / "packed", storage="sparse-bitmask")
    to_dense(tmp_path / "packed", tmp_path / "restored")
    packed, restored = (config_of(tmp_path / name) for name in ("packed", "restored"))
    sparsity = packed.pop("quantization_config")["sparsity_config"]
    assert sorted(sparsity.pop("targets")) == sorted(NAMES)
    assert 0 < sparsity.pop("global_sparsity") < 0.5
    assert sparsity == {
        "format": "sparse-bitmask",
        "sparsity_structure": "unstructured",
        "ignore": [],
        "registry_requires_subclass": False,
    }
    assert packed == restored
    assert sorted(marker.read(restored)) == sorted(set(NAMES) - {name})
    assert marker.read_unstructured(restored) == [name]


def test_layers_that_another_tool_packed_are_marked_as_what_they_are(tmp_path):
    weights = {
        "model.layers.0.mlp.down_proj": two_of_four(4, 8),
        "model.layers.0.mlp.up_proj": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]).float(),
        "model.layers.0.mlp.gate_proj": torch.ones(4, 8),
        "lm_head": two_of_four(4, 8),
    }
    tensors = {
        f"{name}.{kind}": part
        for name, weight in weights.items()
        for kind, part in sparse_bitmask.pack(weight)._asdict().items()
    }
    sparsity = {"format": "sparse-bitmask", "targets": ["Linear"]}
    config = {"quantization_config": {"sparsity_config": sparsity}}
    to_dense(write(tmp_path / "packed", tensors, config=config), tmp_path / "dense")
    for name, weight in weights.items():
        assert torch.equal(read(tmp_path / "dense")[f"{name}.weight"], weight)
    restored = config_of(tmp_path / "dense")
    assert marker.read(restored) == ["model.layers.0.mlp.down_proj"]
    assert marker.read_unstructured(restored) == ["model.layers.0.mlp.up_proj"]


def test_a_marker_is_kept_when_any_mask_is_packed(tmp_path):
    config = {"model_type": "llama"}
    marker.write(config, NAMES[2:], NAMES[:2])
    dense = write(tmp_path / "dense", decoder(), config=config)
    to_packed(dense, tmp_path / "packed", storage="sparse-bitmask")
    to_dense(tmp_path / "packed", tmp_path / "restored")
    assert config_of(tmp_path / "restored") == config


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


@pytest.mark.parametrize("storage", ["sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 0.5625), (torch.int8, 0.625)]
)
def test_packed_weights_take_the_documented_share_of_the_disk(
    tmp_path, dtype, share, storage
):
    tensors = {"layers.0.up_proj.weight": two_of_four(256, 2048, dtype)}
    dense = write(tmp_path / "dense", tensors)
    to_packed(dense, tmp_path / "packed", storage=storage)
    before, after = (
        (tmp_path / folder / "model.safetensors").stat().st_size
        for folder in ("dense", "packed")
    )
    assert share <= after / before <= share * 1.01


@pytest.mark.parametrize("layout", [sparse_24_bitmask, sparse_bitmask])
def test_parts_in_different_shards_are_found(tmp_path, layout):
    packed = layout.pack(two_of_four(4, 8))
    parts = {f"h.0.fc.{kind}": value for kind, value in packed._asdict().items()}
    sparsity = {"format": layout.NAME, "targets": ["h.0.fc"]}
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

    original = ShardWriter.write
    monkeypatch.setattr(ShardWriter, "write", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError if error else KeyboardInterrupt):
        to_packed(dense, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out"}
