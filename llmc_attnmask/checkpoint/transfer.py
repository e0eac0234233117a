"""Transfer tensors from one checkpoint into another, a few megabytes at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from llmc_attnmask.checkpoint import layout
from llmc_attnmask.checkpoint.io.files import StoredTensor, TensorSpec
from llmc_attnmask.checkpoint.io.writer import ShardWriter

# The layout deals with bits, not values, so any dtype with as many bytes will do.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


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


@dataclass(frozen=True)
class Pack:
    """Encodes a dense weight as three tensors."""

    module: str
    tensor: StoredTensor  # [R, C]

    @property
    def outputs(self) -> list[TensorSpec]:
        t = self.tensor
        rows, columns = t.shape
        mask = (rows, -(-columns // 8))
        return [
            TensorSpec(
                f"{self.module}.compressed", t.dtype, (rows, columns // 2), t.bytes // 2
            ),
            TensorSpec(f"{self.module}.bitmask", "U8", mask, prod(mask)),
            TensorSpec(f"{self.module}.shape", "I64", (2, 1), 16),
        ]

    def write(self, writer: ShardWriter) -> None:
        """Write the three tensors.

        :raises NotTwoOfFourError: naming the tensor
        """
        rows, columns = self.tensor.shape
        writer.write(f"{self.module}.shape", 0, torch.tensor([[rows], [columns]]))
        row = columns * self.tensor.itemsize
        for start, block in self.tensor.blocks(row):
            try:
                packed = layout.pack(_matrix(block, columns, self.tensor.itemsize))
            except layout.NotTwoOfFourError:
                raise not_two_of_four(self.tensor) from None
            writer.write(f"{self.module}.compressed", start // 2, packed.compressed)
            done = start // row * packed.bitmask.shape[1]
            writer.write(f"{self.module}.bitmask", done, packed.bitmask)


@dataclass(frozen=True)
class Unpack:
    """Decodes three tensors into a dense weight."""

    module: str
    compressed: StoredTensor
    bitmask: StoredTensor
    shape: StoredTensor

    def check(self) -> None:
        """Compare what the headers say about the three tensors.

        :raises ValueError: if their shapes or dtypes do not fit together
        """
        try:
            if (self.shape.dtype, self.shape.bytes) != ("I64", 16):
                raise ValueError(
                    f"shape is {self.shape.dtype} {list(self.shape.shape)}; expected "
                    "I64 [2, 1]"
                )
            if self.bitmask.dtype != "U8":
                raise ValueError(f"bitmask is {self.bitmask.dtype}; expected U8")
            if self.compressed.bytes and self.compressed.itemsize not in _INTEGERS:
                raise ValueError(
                    f"compressed is {self.compressed.dtype}, of "
                    f"{self.compressed.itemsize} bytes per entry; expected 1, 2 or 4"
                )
            layout.check_shapes(
                self.compressed.shape, self.bitmask.shape, self.shape.load().flatten()
            )
        except ValueError as error:
            raise ValueError(f"{self.module} in {self.bitmask.file}: {error}") from None

    @property
    def outputs(self) -> list[TensorSpec]:
        rows, half = self.compressed.shape
        name, dtype = f"{self.module}.weight", self.compressed.dtype
        return [TensorSpec(name, dtype, (rows, 2 * half), 2 * self.compressed.bytes)]

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

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the dense weight in blocks of rows.

        :return: pairs of the first byte's position in the weight and integers [r, C]
        :raises ValueError: naming the module, if its bitmask is wrong
        """
        columns = 2 * self.compressed.shape[1]
        row, mask_row = columns // 2 * self.compressed.itemsize, self.bitmask.shape[1]
        with self.bitmask.file.open("rb", buffering=0) as masks:
            for start, block in self.compressed.blocks(row):
                values = _matrix(block, columns // 2, self.compressed.itemsize)
                mask = torch.empty(len(values), mask_row, dtype=torch.uint8)
                self.bitmask.read(masks, start // row * mask_row, mask.view(-1))
                try:
                    weight = layout.unpack(values, mask, [len(values), columns])
                except layout.NotTwoOfFourError:
                    raise ValueError(
                        f"{self.module} in {self.bitmask.file}: the bitmask does not "
                        "have exactly two bits set in every group of four inputs; the "
                        "file is corrupt"
                    ) from None
                yield 2 * start, weight


def is_two_of_four(tensor: StoredTensor) -> bool:
    """Return whether a stored weight [R, C] can be packed; stop once it cannot."""
    columns, size = tensor.shape[1], tensor.itemsize
    return columns % 4 == 0 and not any(
        layout.crowded_groups(_matrix(block, columns, size))
        for _, block in tensor.blocks(columns * size)
    )


def zeros_at_start(tensor: StoredTensor) -> float:
    """Return the share of +0.0 in the first megabyte or so of a stored weight."""
    for _, block in tensor.blocks(tensor.itemsize):
        return float((block.view(_INTEGERS[tensor.itemsize]) == 0).float().mean())
    return 0.0


def not_two_of_four(tensor: StoredTensor) -> layout.NotTwoOfFourError:
    """Make the error that says how far a stored weight is from 2:4."""
    columns, size = tensor.shape[1], tensor.itemsize
    if columns % 4:
        found = f"its {columns} inputs are not divisible by 4"
    else:
        crowded = sum(
            layout.crowded_groups(_matrix(block, columns, size))
            for _, block in tensor.blocks(columns * size)
        )
        found = (
            f"{crowded} of its {prod(tensor.shape) // 4} groups of four inputs have "
            "more than two values that are not +0.0"
        )
        if negative := _negative_zeros(tensor):
            found += f" ({negative} entries are -0.0, as W * mask leaves them)"
    return layout.NotTwoOfFourError(
        f"{tensor.name} in {tensor.file} is not 2:4: {found}; prune it, or pack only "
        "what is 2:4 with --only-2of4 (only_2of4=True)"
    )


def _negative_zeros(tensor: StoredTensor) -> int:
    if tensor.dtype.startswith("I"):
        return 0
    return sum(
        int((bits == torch.iinfo(bits.dtype).min).sum())
        for _, block in tensor.blocks(tensor.itemsize)
        for bits in [block.view(_INTEGERS[tensor.itemsize])]
    )


def _matrix(block: Tensor, columns: int, itemsize: int) -> Tensor:
    """View uint8 [bytes] as integers [r, columns] of ``itemsize`` bytes."""
    return block.view(_INTEGERS[itemsize]).view(-1, columns)
