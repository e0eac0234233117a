"""Small checkpoint folders for tests."""

import hashlib
import json
import shutil
import struct
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmc_attnmask.masks.structure import MaskStructure

LINEARS = {  # [out, in] of a decoder layer
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (32, 16),
    "mlp.up_proj": (32, 16),
    "mlp.down_proj": (16, 32),
}
# of weights that can be packed
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
# modules of ``decoder()`` with a 2:4 weight
NAMES = [f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS]
Q = "model.layers.0.self_attn.q_proj"


def two_of_four(
    rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Tensor:
    """Make random values with exactly two zeros in every four columns."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 100, (rows, columns), generator=random)
    values *= torch.randint(0, 2, values.shape, generator=random) * 2 - 1
    order = torch.rand(rows * columns // 4, 4, generator=random).argsort(1)
    values = values.masked_fill((order > 1).view(rows, columns), 0)
    # by way of float, as int64 does not convert to float8
    return values.float().to(dtype)


def write(
    directory: Path,
    tensors: dict[str, Tensor],
    shards: int = 1,
    config: dict | None = None,
) -> Path:
    """Write a checkpoint folder, with an index if there is more than one shard."""
    directory.mkdir()
    content = {"model_type": "llama"} if config is None else config
    (directory / "config.json").write_text(json.dumps(content))
    (directory / "tokenizer.json").write_text('{"tokens": []}')
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    names = list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1, "total_parameters": 7}}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps(index | {"weight_map": weight_map})
    )
    return directory


def decoder(dtype: torch.dtype = torch.bfloat16, layers: int = 2) -> dict[str, Tensor]:
    """Make the tensors of a decoder in which every Linear is 2:4."""
    tensors = {
        f"model.layers.{i}.{name}.weight": two_of_four(*shape, dtype, seed=7 * i + j)
        for i in range(layers)
        for j, (name, shape) in enumerate(LINEARS.items())
    }
    for i in range(layers):
        tensors[f"model.layers.{i}.input_layernorm.weight"] = torch.ones(16)
    tensors["model.embed_tokens.weight"] = torch.ones(40, 16).bfloat16()
    tensors["lm_head.weight"] = torch.ones(40, 16).bfloat16()
    return tensors


def prune_2of4(source: Path, target: Path) -> Path:
    """Copy a checkpoint and prune its decoder's Linears to 2:4 by magnitude."""
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                kept = MaskStructure.parse("2:4").mask(tensor.abs(), 0.5)
                tensors[name] = tensor.masked_fill(~kept, 0.0)
        save_file(tensors, path, {"format": "pt"})
    return target


def read(directory: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def digests(directory: Path) -> dict[str, str]:
    """Return the sha256, dtype and shape of every tensor."""
    return {
        name: f"{hashlib.sha256(raw(tensor)).hexdigest()} {tensor.dtype} {tensor.shape}"
        for name, tensor in read(directory).items()
    }


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def change_config(directory: Path, **fields: object) -> None:
    (directory / "config.json").write_text(json.dumps(config_of(directory) | fields))


def write_header(
    directory: Path, text: str, data: bytes = b"", length: int | None = None
) -> None:
    """Write a safetensors file with any text as its header.

    :param length: what the file says of the header's length; by default the truth
    """
    content = text.encode()
    size = struct.pack("<Q", len(content) if length is None else length)
    (directory / "model.safetensors").write_bytes(size + content + data)
