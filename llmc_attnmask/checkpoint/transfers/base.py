"""What all transfers have in common, and the one that changes nothing."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from llmc_attnmask.checkpoint.io.files import StoredTensor, TensorSpec
from llmc_attnmask.checkpoint.io.writer import ShardWriter
from llmc_attnmask.checkpoint.layouts.bits import INTEGERS

_DTYPES = {"shape": "I64", "bitmask": "U8", "row_offsets": "I64"}  # of the parts


class Transfer(Protocol):
    """One or more tensors of the output, and the source of their bytes."""

    @property
    def outputs(self) -> list[TensorSpec]: ...

    def write(self, writer: ShardWriter) -> None:
        """Write the tensors; this is called once, in a separate thread."""


@dataclass(frozen=True)
class Copy:
    """Copies a tensor unchanged."""

    tensor: StoredTensor

    @property
    def outputs(self) -> list[TensorSpec]:
        t = self.tensor
        return [TensorSpec(t.name, t.dtype, t.shape, t.bytes)]

    def write(self, writer: ShardWriter) -> None:
        for start, block in self.tensor.blocks():
            writer.write(self.tensor.name, start, block)


class Pack(Transfer, Protocol):
    """Encodes a dense weight as several tensors."""

    @property
    def module(self) -> str: ...

    @property
    def tensor(self) -> StoredTensor:
        """The dense weight [R, C]."""

    @property
    def zeros(self) -> int:
        """How many entries are not stored."""


@dataclass(frozen=True)
class Unpack(ABC):
    """Decodes several tensors into a dense weight."""

    storage = ""  # as config.json calls it

    module: str
    parts: dict[str, StoredTensor]  # by the last part of their names

    def check(self) -> None:
        """Compare what the headers say about the tensors.

        :raises ValueError: if their shapes or dtypes do not fit together
        """
        values = self.parts["compressed"]
        try:
            for name, part in self.parts.items():
                if part.dtype != _DTYPES.get(name, part.dtype):
                    raise ValueError(
                        f"the part {name} is {part.dtype}; expected {_DTYPES[name]}"
                    )
            if self.parts["shape"].bytes != 16:
                raise ValueError(
                    f"the part shape has {prod(self.parts['shape'].shape)} entries; "
                    "expected two"
                )
            if self.itemsize not in INTEGERS:
                raise ValueError(
                    f"compressed is {values.dtype}, of {self.itemsize} bytes per "
                    "entry; expected 1, 2 or 4"
                )
            self.check_shapes(self.parts["shape"].load().flatten().tolist())
        except ValueError as error:
            raise ValueError(f"{self.place}: {error}") from None

    @abstractmethod
    def check_shapes(self, shape: list[int]) -> None:
        """Compare the shapes of the parts.

        :param shape: the content of the part of this name
        :raises ValueError: if they disagree
        """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the dense weight."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the dense weight in blocks of rows.

        :return: pairs of the first byte's position in the weight and integers [r, C]
        :raises ValueError: naming the module, if the parts do not fit together
        """

    @property
    def outputs(self) -> list[TensorSpec]:
        values = self.parts["compressed"]
        rows, columns = self.shape
        size = rows * columns * self.itemsize
        return [TensorSpec(f"{self.module}.weight", values.dtype, self.shape, size)]

    @property
    def itemsize(self) -> int:
        """Bytes per entry; ``compressed`` may be empty."""
        return self.parts["compressed"].torch_dtype.itemsize

    def write(self, writer: ShardWriter) -> None:
        for start, weight in self.rows():
            writer.write(f"{self.module}.weight", start, weight)

    def load(self) -> Tensor:
        """Return the whole dense weight."""
        (spec,) = self.outputs
        content = torch.empty(spec.bytes, dtype=torch.uint8)
        for start, rows in self.rows():
            block = rows.view(-1).view(torch.uint8)
            content[start : start + len(block)] = block
        return content.view(spec.torch_dtype).view(spec.shape)

    @property
    def place(self) -> str:
        """The layer and its file, for messages."""
        return f"{self.module} in {self.parts['bitmask'].file}"
