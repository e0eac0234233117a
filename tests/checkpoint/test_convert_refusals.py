"""Checkpoints that cannot be converted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.checkpoint.convert import to_dense, to_packed
from tests.support.checkpoints import Q, config_of, decoder, read, write

pytestmark = pytest.mark.usefixtures("small_blocks")


def test_a_checkpoint_already_in_the_requested_storage_is_refused(tmp_path):
    dense = write(tmp_path / "dense", decoder())
    to_packed(dense, tmp_path / "packed")
    with pytest.raises(ValueError, match="already packed"):
        to_packed(tmp_path / "packed", tmp_path / "again")
    with pytest.raises(ValueError, match="is not packed"):
        to_dense(dense, tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "packed"}


@pytest.mark.parametrize("wrong", [[1], {"sparsity_config": "24"}])
def test_a_config_of_another_shape_is_refused(tmp_path, wrong):
    config = {"quantization_config": wrong}
    source = write(tmp_path / "in", decoder(), config=config)
    for convert in (to_packed, to_dense):
        with pytest.raises(
            ValueError, match=r"^config.json has a (quan|spar).*_config"
        ):
            convert(source, tmp_path / "out")


def test_another_quantization_library_is_refused(tmp_path):
    config = {"quantization_config": {"quant_method": "gptq"}}
    dense = write(tmp_path / "dense", decoder(), config=config)
    with pytest.raises(ValueError, match="quant_method 'gptq'; expected compressed-te"):
        to_packed(dense, tmp_path / "packed")


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


def long_shape(packed: Path) -> None:
    change(packed, f"{Q}.shape", lambda shape: shape.repeat(2, 1))


def unknown_format(packed: Path) -> None:
    change_format(packed, "marlin-24")


def other_format(packed: Path) -> None:
    config = config_of(packed)
    now = config["quantization_config"]["sparsity_config"]["format"]
    others = {"sparse-bitmask", "sparse-24-bitmask"} - {now}
    change_format(packed, *others)


def change_format(packed: Path, name: str) -> None:
    config = config_of(packed)
    config["quantization_config"]["sparsity_config"]["format"] = name
    (packed / "config.json").write_text(json.dumps(config))


def no_offsets(packed: Path) -> None:
    change(packed, f"{Q}.row_offsets", lambda _: None)


def offsets_that_go_back(packed: Path) -> None:
    change(packed, f"{Q}.row_offsets", lambda offsets: offsets.flip(0))


def offsets_past_the_end(packed: Path) -> None:
    change(packed, f"{Q}.row_offsets", lambda offsets: offsets + 2**60)


def too_few_offsets(packed: Path) -> None:
    change(packed, f"{Q}.row_offsets", lambda offsets: offsets[1:])


def wrong_offsets_dtype(packed: Path) -> None:
    change(packed, f"{Q}.row_offsets", lambda offsets: offsets.int())


def cut_values(packed: Path) -> None:
    change(packed, f"{Q}.compressed", lambda values: values[:-1])


def more_values(packed: Path) -> None:
    change(packed, f"{Q}.compressed", lambda values: values.repeat(2))


def one_bit_more(packed: Path) -> None:
    change(packed, f"{Q}.bitmask", _with_a_bit_more)


def _with_a_bit_more(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[-1, -1] = 255
    return mask


def no_packed_tensors(packed: Path) -> None:
    save_file({"x": torch.ones(2)}, packed / "model.safetensors")


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (corrupt_bitmask, rf"{Q} in .*model\.safetensors: .* exactly two bits"),
        (wrong_shape, rf"{Q} in .*: .* shape \[20, 20\] disagree"),
        (wrong_bitmask_shape, rf"{Q} in .*: .*disagree"),
        (wrong_shape_dtype, rf"{Q} in .*: the part shape is I32; exp"),
        (wrong_bitmask_dtype, rf"{Q} in .*: the part bitmask is I8; expected U8"),
        (no_bitmask, rf"{Q}\.compressed in .* has no {Q}\.bitmask"),
        (no_values, rf"{Q}\.bitmask in .* has no {Q}\.compressed"),
        (wide_values, rf"{Q} in .*: .*of 8 bytes per entry"),
        (long_shape, rf"{Q} in .*: the part shape has 4 entries; expected two"),
        (unknown_format, "format 'marlin-24'; expected sparse-24-bitmask, sparse-"),
        (other_format, r"stored as sparse-24-bitmask, but config.json says sparse-b"),
        (no_packed_tensors, r"no tensor named \*\.compressed"),
    ],
)
def test_a_corrupt_packed_checkpoint_is_refused(tmp_path, corrupt, message):
    to_packed(write(tmp_path / "dense", decoder()), tmp_path / "packed")
    corrupt(tmp_path / "packed")
    with pytest.raises(ValueError, match=message):
        to_dense(tmp_path / "packed", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "packed"}


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (one_bit_more, rf"{Q} in .*safetensors: .* bits set, but there are"),
        (
            corrupt_bitmask,
            rf"{Q} in .*: a row starts at value .* according to the b",
        ),
        (cut_values, rf"{Q} in .*: .* bits set, but there are \d+ values"),
        (more_values, rf"{Q} in .*: .* bits set, but there are \d+ values"),
        (offsets_that_go_back, rf"{Q} in .*: a row starts at value"),
        (offsets_past_the_end, rf"{Q} in .*: a row starts at value 11529215046068469"),
        (too_few_offsets, rf"{Q} in .*disagree; expected \[n\]"),
        (wrong_offsets_dtype, rf"{Q} in .*: the part row_offsets is I32; expected I64"),
        (wrong_shape, rf"{Q} in .*: .* shape \[20, 20\] .*disagree"),
        (wrong_bitmask_shape, rf"{Q} in .*: .*disagree"),
        (wrong_shape_dtype, rf"{Q} in .*: the part shape is I32; exp"),
        (no_bitmask, rf"{Q}\.compressed in .* has no {Q}\.bitmask"),
        (no_values, rf"{Q}\.bitmask in .* has no {Q}\.compressed"),
        (no_offsets, rf"{Q}\.compressed in .* has no {Q}\.row_offsets"),
        (wide_values, rf"{Q} in .*: .*of 8 bytes per entry"),
        (other_format, r"stored as sparse-bitmask, but config.json says sparse-24-b"),
    ],
)
def test_a_corrupt_checkpoint_with_any_mask_is_refused(tmp_path, corrupt, message):
    dense = write(tmp_path / "dense", decoder())
    to_packed(dense, tmp_path / "packed", storage="sparse-bitmask")
    corrupt(tmp_path / "packed")
    with pytest.raises(ValueError, match=message):
        to_dense(tmp_path / "packed", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "packed"}


def test_a_weight_that_changes_while_it_is_packed_is_noticed(tmp_path, monkeypatch):
    dense = write(tmp_path / "dense", decoder())
    # as if it had been counted before the change
    monkeypatch.setattr("llmc_attnmask.checkpoint.scan.entries", lambda _: 5)
    with pytest.raises(ValueError, match=r"had 5 entries .* the file changed while"):
        to_packed(dense, tmp_path / "packed", storage="sparse-bitmask")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_choosing_2of4_layers_for_a_storage_of_any_mask_is_refused(tmp_path):
    dense = write(tmp_path / "dense", decoder())
    with pytest.raises(ValueError, match="--only-2of4 chooses layers for sparse-24-b"):
        to_packed(dense, tmp_path / "o", storage="sparse-bitmask", only_2of4=True)


def test_a_layer_that_the_marker_wrongly_calls_2of4_is_refused(tmp_path):
    tensors = decoder()
    tensors[f"{Q}.weight"][0, :4] = 1
    config = {"model_type": "llama"}
    marker.write(config, [Q])
    dense = write(tmp_path / "dense", tensors, config=config)
    with pytest.raises(ValueError, match=rf"{Q}\.weight in .* is not 2:4: 1 of its"):
        to_packed(dense, tmp_path / "packed", storage="sparse-bitmask")


@pytest.mark.parametrize("storage", ["dense", "bogus"])
def test_another_storage_than_the_packed_ones_is_refused(tmp_path, storage):
    dense = write(tmp_path / "dense", decoder())
    with pytest.raises(ValueError, match=f"storage is '{storage}'; expected sparse-24"):
        to_packed(dense, tmp_path / "packed", storage=storage)
