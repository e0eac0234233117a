import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmc_attnmask.checkpoint import layout, marker, transfer
from llmc_attnmask.checkpoint.convert import (
    CheckpointWarning,
    NothingToPackError,
    pack,
    unpack,
)
from tests.support.checkpoints import (
    LINEARS,
    config_of,
    decoder,
    digests,
    read,
    two_of_four,
    write,
)

NAMES = [f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tensors take several blocks, as large ones do."""
    monkeypatch.setattr("llmc_attnmask.checkpoint.io.files.BLOCK", 100)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn],
)
def test_every_tensor_has_its_sha256_back_after_a_round_trip(tmp_path, shards, dtype):
    dense = write(tmp_path / "dense", decoder(dtype), shards)
    packed = pack(dense, tmp_path / "packed")
    assert sorted(packed.layers) == sorted(NAMES)
    restored = unpack(tmp_path / "packed", tmp_path / "restored")
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
def test_round_trips_of_any_shape_and_sharding(
    tmp_path_factory, rows, groups, dtype, shards, layers, seed
):
    folder = tmp_path_factory.mktemp("any")
    tensors = {
        f"h.{i}.fc.weight": two_of_four(rows, 4 * groups, dtype, seed + i)
        for i in range(layers)
    }
    tensors |= {"norm.weight": torch.ones(3), "wte.weight": torch.ones(2, 5)}
    dense = write(folder / "dense", tensors, shards)
    pack(dense, folder / "packed")
    unpack(folder / "packed", folder / "restored")
    assert digests(folder / "restored") == digests(dense)


def test_packed_tensors_are_the_layouts_own(tmp_path):
    dense = write(tmp_path / "dense", decoder())
    pack(dense, tmp_path / "packed")
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


def test_the_config_of_an_unquantized_packed_checkpoint(tmp_path):
    dense = write(tmp_path / "dense", decoder(), shards=2)
    pack(dense, tmp_path / "packed")
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
    unpack(tmp_path / "packed", tmp_path / "restored")
    config = config_of(tmp_path / "restored")
    assert sorted(marker.read(config)) == sorted(NAMES)
    assert "quantization_config" not in config


def test_a_quantization_config_keeps_what_it_says(tmp_path):
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
    marker.write(config, [Q, "model.layers.9.other"])
    dense = write(tmp_path / "dense", decoder(torch.int8), config=config)
    pack(dense, tmp_path / "packed")
    packed = config_of(tmp_path / "packed")
    assert marker.read(packed) == ["model.layers.9.other"]
    sparsity = packed["quantization_config"].pop("sparsity_config")
    assert sparsity["format"] == "sparse-24-bitmask"
    quantization.pop("sparsity_config")
    assert packed["quantization_config"] == quantization
    unpack(tmp_path / "packed", tmp_path / "restored")
    restored = config_of(tmp_path / "restored")
    assert restored["quantization_config"] == quantization
    assert set(marker.read(restored)) == {*NAMES, "model.layers.9.other"}


def test_the_index_names_what_the_shards_have(tmp_path):
    dense = write(tmp_path / "dense", decoder(), shards=3)
    pack(dense, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "restored")
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
def test_size_on_disk_of_packed_weights(tmp_path, dtype, share):
    tensors = {"layers.0.up_proj.weight": two_of_four(256, 512, dtype)}
    dense = write(tmp_path / "dense", tensors)
    pack(dense, tmp_path / "packed")
    before, after = (
        (tmp_path / folder / "model.safetensors").stat().st_size
        for folder in ("dense", "packed")
    )
    assert share <= after / before <= share * 1.01


def test_a_layer_that_is_not_2of4_is_named(tmp_path):
    tensors = decoder()
    weight = tensors[f"{Q}.weight"]
    weight[9, 4:8] = 1
    weight[15] = 1
    dense = write(tmp_path / "dense", tensors)
    message = rf"{re.escape(Q)}\.weight in .* is not 2:4: 5 of its 64 groups .*--only"
    with pytest.raises(layout.NotTwoOfFourError, match=message):
        pack(dense, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_inputs_that_are_no_groups_of_four_are_named(tmp_path):
    tensors = {"h.0.fc.weight": torch.zeros(2, 6), "h.1.fc.weight": torch.zeros(2, 8)}
    dense = write(tmp_path / "dense", tensors)
    with pytest.raises(layout.NotTwoOfFourError, match=r"h\.0\.fc.* 6 inputs are not"):
        pack(dense, tmp_path / "packed")
    conversion = pack(dense, tmp_path / "packed", only_2of4=True)
    assert conversion.layers == ["h.1.fc"]


def test_only_what_is_2of4_is_packed_and_fused_layers_together(tmp_path):
    tensors = decoder()
    for name in ("0.self_attn.k_proj", "0.mlp.down_proj", "1.mlp.up_proj"):
        tensors[f"model.layers.{name}.weight"].fill_(1)
    dense = write(tmp_path / "dense", tensors)
    with pytest.warns(CheckpointWarning) as caught:
        conversion = pack(dense, tmp_path / "packed", only_2of4=True)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert messages[0] == (
        "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj stay dense: "
        "servers fuse them with model.layers.0.self_attn.k_proj, which cannot be packed"
    )
    assert "model.layers.1.mlp.gate_proj stay dense" in messages[1]
    dense_layers = {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    }
    assert set(conversion.layers) == set(NAMES) - dense_layers
    unpack(tmp_path / "packed", tmp_path / "restored")
    assert digests(tmp_path / "restored") == digests(dense)


def test_modules_that_are_fused_already_are_packed(tmp_path):
    tensors = {
        "layers.0.self_attn.qkv_proj.weight": two_of_four(24, 8),
        "layers.0.mlp.gate_up_proj.weight": two_of_four(16, 8),
        "layers.1.mlp.gate_up_proj.weight": torch.ones(16, 8),
    }
    dense = write(tmp_path / "dense", tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conversion = pack(dense, tmp_path / "packed", only_2of4=True)
    assert len(conversion.layers) == 2


def test_routers_and_embeddings_are_not_expected_to_be_2of4(tmp_path):
    tensors = decoder() | {"model.layers.0.mlp.gate.weight": torch.ones(4, 16)}
    dense = write(tmp_path / "dense", tensors)
    assert sorted(pack(dense, tmp_path / "packed").layers) == sorted(NAMES)


def test_minus_zero_in_a_pruned_place_is_not_2of4(tmp_path):
    weight = two_of_four(4, 8).masked_fill(torch.zeros(4, 8).bool(), 0)
    weight[weight == 0] = -0.0
    dense = write(tmp_path / "dense", {"h.0.fc.weight": weight})
    with pytest.raises(layout.NotTwoOfFourError, match=r"that are not \+0\.0"):
        pack(dense, tmp_path / "packed")


def test_integers_packed_in_words_cannot_be_packed(tmp_path):
    tensors = {"layers.0.fc.weight_packed": torch.ones(8, 2, dtype=torch.int32)}
    dense = write(tmp_path / "dense", tensors)
    with pytest.raises(NothingToPackError, match="W4A16"):
        pack(dense, tmp_path / "packed")


def test_a_dense_model_has_nothing_to_pack(tmp_path):
    dense = write(tmp_path / "dense", {"h.0.fc.weight": torch.ones(4, 8)})
    with pytest.raises(NothingToPackError, match=r"no Linear of its decoder .* is 2:4"):
        pack(dense, tmp_path / "packed", only_2of4=True)


def test_what_is_in_the_storage_already_is_refused(tmp_path):
    dense = write(tmp_path / "dense", decoder())
    pack(dense, tmp_path / "packed")
    with pytest.raises(ValueError, match="packed already"):
        pack(tmp_path / "packed", tmp_path / "again")
    with pytest.raises(ValueError, match="is not packed"):
        unpack(dense, tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "packed"}


def test_parts_in_different_shards_are_found(tmp_path):
    packed = layout.pack(two_of_four(4, 8))
    parts = {f"h.0.fc.{kind}": value for kind, value in packed._asdict().items()}
    sparsity = {"format": "sparse-24-bitmask", "targets": ["h.0.fc"]}
    config = {"quantization_config": {"sparsity_config": sparsity}}
    folder = write(tmp_path / "packed", parts, shards=3, config=config)
    unpack(folder, tmp_path / "restored")
    (weight,) = read(tmp_path / "restored").values()
    assert torch.equal(weight, two_of_four(4, 8))


def test_subfolders_are_copied_and_hidden_files_are_not(tmp_path):
    dense = write(tmp_path / "dense", decoder())
    (dense / "code").mkdir()
    (dense / "code" / "model.py").write_text("x = 1")
    (dense / ".cache").mkdir()
    pack(dense, tmp_path / "packed")
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
    # a disk that is mounted there can be filled, not replaced
    monkeypatch.setattr(Path, "rmdir", lambda _: pytest.fail("removed"))
    pack(source, output)
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in target.iterdir()) == names
    assert len(list(tmp_path.iterdir())) == (3 if "link" in kind else 2)


def test_a_matrix_without_entries_goes_round(tmp_path):
    empty = {f"{Q}.weight": torch.empty(0, 8).bfloat16()}
    source = write(tmp_path / "in", decoder() | empty)
    with pytest.warns(CheckpointWarning, match="stay dense"):
        pack(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "out")
    assert digests(source) == digests(tmp_path / "out")


@pytest.mark.parametrize("wrong", [[1], {"sparsity_config": "24"}])
def test_a_config_of_another_shape_is_refused(tmp_path, wrong):
    config = {"quantization_config": wrong}
    source = write(tmp_path / "in", decoder(), config=config)
    for convert in (pack, unpack):
        with pytest.raises(
            ValueError, match=r"^config.json has a (quan|spar).*_config"
        ):
            convert(source, tmp_path / "out")


def test_an_output_that_is_not_empty_is_left_alone(tmp_path):
    dense = write(tmp_path / "dense", decoder())
    before = digests(dense)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        pack(dense, dense)
    assert digests(dense) == before


@pytest.mark.parametrize("how", ["error", "interrupt"])
def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch, how):
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
        pack(dense, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out"}


def corrupt_bitmask(packed: Path) -> None:
    change(packed, f"{Q}.bitmask", lambda mask: mask.clone().fill_(7))


def wrong_shape(packed: Path) -> None:
    change(packed, f"{Q}.shape", lambda shape: shape + 4)


def wrong_bitmask_shape(packed: Path) -> None:
    change(packed, f"{Q}.bitmask", lambda mask: mask[:, :1].contiguous())


def wrong_shape_dtype(packed: Path) -> None:
    change(packed, f"{Q}.shape", lambda shape: shape.int())


def wrong_bitmask_dtype(packed: Path) -> None:
    change(packed, f"{Q}.bitmask", lambda mask: mask.to(torch.int8))


def no_bitmask(packed: Path) -> None:
    change(packed, f"{Q}.bitmask", lambda _: None)


def no_values(packed: Path) -> None:
    change(packed, f"{Q}.compressed", lambda _: None)


def wide_values(packed: Path) -> None:
    change(packed, f"{Q}.compressed", lambda values: values.double())


def change(packed: Path, name: str, new) -> None:
    tensors = read(packed)
    value = new(tensors.pop(name))
    if value is not None:
        tensors[name] = value
    save_file(tensors, packed / "model.safetensors")


def unknown_format(packed: Path) -> None:
    config = config_of(packed)
    config["quantization_config"]["sparsity_config"]["format"] = "sparse-bitmask"
    (packed / "config.json").write_text(json.dumps(config))


def no_packed_tensors(packed: Path) -> None:
    save_file({"x": torch.ones(2)}, packed / "model.safetensors")


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (corrupt_bitmask, rf"{Q} in .*model\.safetensors: .* exactly two bits"),
        (wrong_shape, rf"{Q} in .*: .* shape \[20, 20\] disagree"),
        (wrong_bitmask_shape, rf"{Q} in .*: .*disagree"),
        (wrong_shape_dtype, rf"{Q} in .*: shape is I32"),
        (wrong_bitmask_dtype, rf"{Q} in .*: bitmask is I8; expected U8"),
        (no_bitmask, rf"{Q}\.compressed in .* has no {Q}\.bitmask"),
        (no_values, rf"{Q}\.bitmask in .* has no {Q}\.compressed"),
        (wide_values, rf"{Q} in .*: .*of 8 bytes per entry"),
        (unknown_format, "format 'sparse-bitmask'; expected"),
        (no_packed_tensors, r"no tensor named \*\.compressed"),
    ],
)
def test_a_corrupt_packed_checkpoint_is_refused(tmp_path, corrupt, message):
    pack(write(tmp_path / "dense", decoder()), tmp_path / "packed")
    corrupt(tmp_path / "packed")
    with pytest.raises(ValueError, match=message):
        unpack(tmp_path / "packed", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "packed"}


def test_another_quantization_library_is_refused(tmp_path):
    config = {"quantization_config": {"quant_method": "gptq"}}
    dense = write(tmp_path / "dense", decoder(), config=config)
    with pytest.raises(ValueError, match="quant_method 'gptq'; expected compressed-te"):
        pack(dense, tmp_path / "packed")
