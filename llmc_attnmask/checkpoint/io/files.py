"""A checkpoint folder: its config, its shards and the position of each tensor."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmc_attnmask.checkpoint.io.json_files import read_mapping, unique

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
BLOCK = 1 << 20  # bytes read at a time: what fits into a processor's cache
# Suffixes of files that `torch.load` and `pickle` read: opening them may run code.
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSpec:
    """What a safetensors header says about a tensor."""

    name: str
    dtype: str  # as safetensors spells it: BF16, I8, F8_E4M3, ...
    shape: tuple[int, ...]
    bytes: int

    @property
    def itemsize(self) -> int:
        return self.bytes // max(1, prod(self.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it.

        :raises ValueError: for a dtype that torch does not have
        """
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"{self.name} has dtype {self.dtype}; expected one of "
                f"{', '.join(_DTYPES)}"
            )
        return _DTYPES[self.dtype]


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor and its position in a safetensors file."""

    file: Path
    offset: int  # of its first byte in the file

    def read(self, source: BinaryIO, start: int, out: Tensor) -> None:
        """Fill ``out`` with the tensor's bytes from ``start`` on.

        :param source: the file, opened unbuffered
        :param out: uint8 [bytes], contiguous
        """
        source.seek(self.offset + start)
        view = out.numpy().data
        while view:
            count = source.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"{self.file} ends within {self.name}: truncated")
            view = view[count:]

    def load(self) -> Tensor:
        """Read the whole tensor."""
        content = torch.empty(self.bytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as source:
            self.read(source, 0, content)
        return content.view(self.torch_dtype).view(self.shape)

    def blocks(
        self, unit: int = 1, size: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield pairs of a first byte's position and the bytes.

        The next block overwrites the bytes.

        :param unit: number of bytes that stay together, such as those of a row
        :param size: of a block; by default about a megabyte
        """
        if not self.bytes:
            return
        step = max(1, (BLOCK if size is None else size) // unit) * unit
        buffer = torch.empty(min(step, self.bytes), dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as source:
            for start in range(0, self.bytes, step):
                block = buffer[: min(step, self.bytes - start)]
                self.read(source, start, block)
                yield start, block


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files, of which only the headers have been read."""

    directory: Path
    shards: dict[str, list[StoredTensor]]  # by file name, in the order of their bytes
    index: dict[str, Any] | None  # content of the index file; None without one
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)  # by file name

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        return {t.name: t for tensors in self.shards.values() for t in tensors}

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of config.json.

        :raises FileNotFoundError: if it is missing
        :raises ValueError: if it is not a mapping
        """
        return read_mapping(self.directory / CONFIG)


def is_pickled(path: Path) -> bool:
    """Return whether opening a file may run code, judging by its name."""
    return path.suffix in _PICKLED


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Read the headers of a checkpoint's safetensors files and check them.

    The files are those that the index names or, without an index, all in the folder.

    :raises FileNotFoundError: if there are none, or if the index names a missing one
    :raises ValueError: for files that cannot be read, an index that points outside the
        folder or contradicts the files, and a tensor that is stored twice
    """
    directory = Path(directory)
    index = None
    if (directory / INDEX).exists():
        index = read_mapping(directory / INDEX)
        names = _indexed_files(directory, index)
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError(_no_weights(directory))
    shards: dict[str, list[StoredTensor]] = {}
    metadata: dict[str, dict[str, str]] = {}
    places: dict[str, str] = {}
    for name in names:
        shards[name], metadata[name] = _read_header(directory / name)
        for tensor in shards[name]:
            if tensor.name in places:
                raise ValueError(
                    f"{tensor.name} is stored twice in {directory}: in "
                    f"{places[tensor.name]} and {name}; remove the stale one"
                )
            places[tensor.name] = name
    if index is not None:
        for tensor_name, file in index["weight_map"].items():
            if places.get(tensor_name) != file:
                raise ValueError(
                    f"{directory / INDEX} says that {tensor_name} is in {file}, which "
                    "does not have it; the checkpoint is incomplete or mixed up"
                )
    return Checkpoint(directory, shards, index, metadata)


def _no_weights(directory: Path) -> str:
    pickled = sorted(path.name for path in directory.glob("*") if is_pickled(path))
    if pickled:
        return (
            f"{directory} has no .safetensors file, only {pickled[0]}, which is "
            "pickled: opening it may run code, so it is not read; convert it to "
            "safetensors"
        )
    return f"{directory} has no .safetensors file, so it is not a checkpoint"


def _indexed_files(directory: Path, index: dict[str, Any]) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ValueError(
            f"{directory / INDEX} has no weight_map from tensor names to file names"
        )
    if not isinstance(index.setdefault("metadata", {}), dict):
        raise ValueError(f"{directory / INDEX} has metadata that is not a mapping")
    names = sorted(set(weight_map.values()))
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(
                f"{directory / INDEX} names the file {name!r}, which is outside the "
                "checkpoint's folder"
            )
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory / INDEX} names the file {name}, which is missing"
            )
    return names


def _read_header(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    if not path.is_file():  # opening a pipe would block forever
        raise ValueError(f"{path} is not a file but a folder, a pipe or a broken link")
    try:
        with safe_open(path, framework="np"):  # checks offsets against shapes and size
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=unique)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: {error}"
        ) from None
    metadata = header.pop("__metadata__", {})
    tensors = [
        StoredTensor(
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            end - start,
            path,
            8 + length + start,
        )
        for name, entry in header.items()
        for start, end in [entry["data_offsets"]]
    ]
    for tensor in tensors:  # without data, a header may claim any size
        if not tensor.bytes and prod(max(1, n) for n in tensor.shape) >= 1 << 63:
            raise ValueError(
                f"{path} is not a readable safetensors file: {tensor.name} has the "
                f"shape {list(tensor.shape)}, which no tensor can have"
            )
    return sorted(tensors, key=lambda tensor: tensor.offset), metadata or {}
