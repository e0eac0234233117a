"""A checkpoint folder: its config, its shards and where each tensor's bytes are."""

import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
BLOCK = 1 << 20  # bytes read at once: what a processor's cache holds

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
    """What a safetensors header says of a tensor."""

    name: str
    dtype: str  # as safetensors spells it: BF16, I8, F8_E4M3, ...
    shape: tuple[int, ...]
    bytes: int

    @property
    def itemsize(self) -> int:
        return self.bytes // max(1, prod(self.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """:raises ValueError: for a dtype that torch has not"""
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"{self.name} has dtype {self.dtype}; expected one of "
                f"{', '.join(_DTYPES)}"
            )
        return _DTYPES[self.dtype]


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor's place in a safetensors file."""

    file: Path
    offset: int  # of its first byte in the file

    def read(self, source: BinaryIO, start: int, out: Tensor) -> None:
        """Fill ``out`` with the bytes from ``start`` on.

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
        """The whole tensor."""
        content = torch.empty(self.bytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as source:
            self.read(source, 0, content)
        return content.view(self.torch_dtype).view(self.shape)

    def blocks(self, unit: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Pairs of the first byte's position and the bytes, a megabyte or so each.

        The bytes are overwritten by the next block.

        :param unit: bytes that stay together, such as a row
        """
        if not self.bytes:
            return
        step = max(1, BLOCK // unit) * unit
        buffer = torch.empty(min(step, self.bytes), dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as source:
            for start in range(0, self.bytes, step):
                block = buffer[: min(step, self.bytes - start)]
                self.read(source, start, block)
                yield start, block


@dataclass(frozen=True)
class Checkpoint:
    """A folder with safetensors files, of which only the headers have been read."""

    directory: Path
    shards: dict[str, list[StoredTensor]]  # by file name, in the order of their bytes
    index: dict[str, Any] | None  # content of the index file, if there is one
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)  # by file name

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        return {t.name: t for tensors in self.shards.values() for t in tensors}

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of config.json.

        :raises FileNotFoundError, ValueError: if there is none or it is no mapping
        """
        return _read_json(self.directory / CONFIG)

    def other_files(self) -> Iterator[Path]:
        """What belongs to the checkpoint beside config, index and weights."""
        known = {CONFIG, INDEX, *self.shards}
        for path in sorted(self.directory.iterdir()):
            if path.name not in known and not path.name.startswith("."):
                yield path


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Read the headers of a checkpoint's safetensors files and check them.

    The files are those that the index names, or without one all of the folder.

    :raises FileNotFoundError: if there are none, or the index names one that is missing
    :raises ValueError: for files that cannot be read, an index that leads outside the
        folder or contradicts the files, and a tensor that is stored twice
    """
    directory = Path(directory)
    index = None
    if (directory / INDEX).exists():
        index = _read_json(directory / INDEX)
        names = _indexed_files(directory, index)
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError(
            f"{directory} has no .safetensors file, so it is not a checkpoint"
        )
    shards: dict[str, list[StoredTensor]] = {}
    metadata: dict[str, dict[str, str]] = {}
    places: dict[str, str] = {}
    for name in names:
        shards[name], metadata[name] = _read_header(directory / name)
        for tensor in shards[name]:
            if tensor.name in places:
                raise ValueError(
                    f"{tensor.name} is stored twice in {directory}: in "
                    f"{places[tensor.name]} and {name}; remove the one that is stale"
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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}, so it is not a checkpoint"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping but {type(content).__name__}")
    return content


def _read_header(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt"):  # checks offsets against shapes and size
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: {error}"
        ) from None
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
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
    return sorted(tensors, key=lambda tensor: tensor.offset), metadata


class ShardWriter:
    """Writes a safetensors file whose tensors are known, their bytes in any order."""

    def __init__(
        self,
        path: Path,
        tensors: Sequence[TensorSpec],
        metadata: dict[str, str],
    ):
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        self._places: dict[str, int] = {}
        end = 0
        # the largest entries first, so that all are aligned
        for tensor in sorted(tensors, key=lambda spec: (-spec.itemsize, spec.name)):
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": [end, end + tensor.bytes],
            }
            self._places[tensor.name] = end
            end += tensor.bytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._path = path
        self._start = 8 + len(encoded)
        self._file = path.open("wb", buffering=0)
        self._write_at(0, struct.pack("<Q", len(encoded)) + encoded)
        with self._named():
            self._file.truncate(self._start + end)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, name: str, start: int, data: Tensor) -> None:
        """Write a part of a tensor.

        :param start: position of its first byte within the tensor
        :param data: contiguous, of any dtype
        """
        if data.numel():
            content = data.reshape(-1).view(torch.uint8).numpy()
            self._write_at(self._start + self._places[name] + start, content.data)

    def _write_at(self, position: int, content: bytes | memoryview) -> None:
        view = memoryview(content)
        with self._named():
            while view:
                count = os.pwrite(self._file.fileno(), view, position)
                position, view = position + count, view[count:]

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the disk name the file, as those of ``open`` do."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
