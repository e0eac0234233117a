"""Write a safetensors file without all tensors in memory, and name disk errors."""

import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from llmc_attnmask.checkpoint.io.files import TensorSpec


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the disk errors that safetensors reports as its own into OSError.

    :param path: file or folder that is being written
    :raises OSError: as ``open`` would, for example for a full disk
    """
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        code = int(found[1])
        raise OSError(code, os.strerror(code), str(path)) from error


class ShardWriter:
    """Writes a safetensors file whose header is known; the bytes come in any order."""

    def __init__(
        self,
        path: Path,
        tensors: Sequence[TensorSpec],
        metadata: dict[str, str],
    ):
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        self._places: dict[str, int] = {}
        end = 0
        # largest entries first, so that all tensors are aligned
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
        """Write part of a tensor.

        :param start: position of the part's first byte within the tensor
        :param data: contiguous, any dtype
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
        """Name the file in disk errors, as ``open`` does."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
