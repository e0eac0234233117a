"""Compare with the last compressed-tensors that vLLM's native 2:4 was built on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc_attnmask.checkpoint.convert import to_packed
from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask, sparse_bitmask
from llmc_attnmask.oneshot.prune import prune
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.checkpoints import prune_2of4, raw, read, two_of_four
from tests.upstream.test_save import QUICK, written

pytestmark = pytest.mark.slow
RELEASE = "0.13.0"
DTYPES = [torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]

# compresses `tensors`, decompresses the `packed` folder and parses its config
SCRIPT = """
import json, sys
from pathlib import Path
import compressed_tensors
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import SparsityCompressionConfig
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
folder = Path(sys.argv[1])
print(compressed_tensors.__version__)
config = json.loads((folder / "packed" / "config.json").read_text())
quantization = config["quantization_config"]
sparsity = quantization.pop("sparsity_config")
format = sparsity.pop("format")
sparsity = SparsityCompressionConfig.load_from_registry(format, **sparsity)
if "config_groups" in quantization:
    QuantizationConfig.model_validate(quantization)
compressor = BaseCompressor.load_from_registry(format, config=sparsity)
tensors = load_file(folder / "tensors.safetensors")
names = {name.removesuffix(".weight") for name in tensors}
save_file(compressor.compress(tensors, names), folder / "compressed.safetensors")
shown = {k: v.contiguous() for k, v in compressor.decompress(str(folder / "packed"))}
save_file(shown, folder / "decompressed.safetensors")
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """Install the release on its own, apart from everything else."""
    target = tmp_path_factory.mktemp("release")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--target", str(target), f"compressed-tensors=={RELEASE}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package registry cannot be reached: {done.stderr[-300:]}")
    return target


def run(release: Path, folder: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTHONPATH": str(release), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == RELEASE


@pytest.mark.parametrize("layout", [sparse_24_bitmask, sparse_bitmask])
def test_the_layout_is_byte_equal_and_read_back(release, tmp_path, layout):
    dense = prune_2of4(MODEL_DIR, tmp_path / "dense")
    # upstream takes -128 for the smallest magnitude: its own compression may lose it
    extreme = torch.tensor([[-128, 0, 1, 0, 0, 0, 2, -128]], dtype=torch.int8)
    named = read(dense) | {"model.layers.0.extreme_proj.weight": extreme}
    save_file(named, dense / "model.safetensors")
    to_packed(dense, tmp_path / "packed", storage=layout.NAME)
    tensors = {
        f"{dtype}.{rows}x{columns}.weight": two_of_four(rows, columns, dtype)
        for dtype in DTYPES
        for rows, columns in ((16, 32), (5, 8), (3, 12))
    }
    more_zeros = two_of_four(64, 64, torch.int8)
    more_zeros[:, ::3] = 0
    tensors["more_zeros.weight"] = more_zeros
    save_file(tensors, tmp_path / "tensors.safetensors")
    run(release, tmp_path)
    theirs = load_file(tmp_path / "compressed.safetensors")
    assert len(theirs) == len(layout.Packed._fields) * len(tensors)
    for name, weight in tensors.items():
        ours = layout.pack(weight)._asdict()
        for kind, value in ours.items():
            other = theirs[f"{name.removesuffix('.weight')}.{kind}"]
            assert raw(value) == raw(other), f"{name} {kind}"
            assert (value.dtype, value.shape) == (other.dtype, other.shape)
    decompressed = load_file(tmp_path / "decompressed.safetensors")
    expected = {k: v for k, v in read(dense).items() if k.endswith("_proj.weight")}
    assert len(expected) == 29
    for name, weight in expected.items():
        assert raw(decompressed[name]) == raw(weight), name


@pytest.mark.parametrize(
    ("scheme", "storage"),
    [
        ("W8A8", "sparse-24-bitmask"),
        ("W8A8", "sparse-bitmask"),
        ("FP8_DYNAMIC", "sparse-24-bitmask"),
    ],
)
def test_quantized_checkpoints_are_read_back(release, tmp_path, scheme, storage):
    dense = prune(MODEL_DIR, written(tmp_path, scheme), tmp_path / "dense", **QUICK)
    to_packed(dense, tmp_path / "packed", storage=storage)
    save_file({"a.weight": two_of_four(4, 8)}, tmp_path / "tensors.safetensors")
    run(release, tmp_path)
    decompressed = load_file(tmp_path / "decompressed.safetensors")
    expected = {k: v for k, v in read(dense).items() if k.endswith("_proj.weight")}
    assert {v.element_size() for v in expected.values()} == {1}
    for name, weight in expected.items():
        assert raw(decompressed[name]) == raw(weight), name
