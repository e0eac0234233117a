"""Checkpoints that cannot be converted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
    to_packed(write(tmp_path / "dense", decoder()), tmp_path / "packed")
    corrupt(tmp_path / "packed")
    with pytest.raises(ValueError, match=message):
        to_dense(tmp_path / "packed", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "packed"}
