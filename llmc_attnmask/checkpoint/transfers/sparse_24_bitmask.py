"""Encode and decode weights as ``sparse-24-bitmask``, in blocks of rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from llmc_attnmask.checkpoint import scan
from llmc_attnmask.checkpoint.io.files import StoredTensor, TensorSpec
from llmc_attnmask.checkpoint.io.writer import ShardWriter
from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask as layout
from llmc_attnmask.checkpoint.layouts.bits import mask_bytes, matrix
from llmc_attnmask.checkpoint.transfers import base


@dataclass(frozen=True)
class Pack:
    """Encodes a 2:4 weight."""

    module: str
    tensor: StoredTensor  # [R, C]

    @property
    def zeros(self) -> int:
        return prod(self.tensor.shape) // 2

    @property
    def outputs(self) -> list[TensorSpec]:
        t, name = self.tensor, self.module
        rows, columns = t.shape
        mask = (rows, mask_bytes(columns))
        return [
            TensorSpec(
                f"{name}.compressed", t.dtype, (rows, columns // 2), t.bytes // 2
            ),
            TensorSpec(f"{name}.bitmask", "U8", mask, prod(mask)),
            TensorSpec(f"{name}.shape", "I64", (2, 1), 16),
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
                weight = matrix(block, columns, self.tensor.itemsize)
                packed = layout.pack(weight)
            except layout.NotTwoOfFourError:
                raise scan.not_two_of_four(self.tensor) from None
            writer.write(f"{self.module}.compressed", start // 2, packed.compressed)
            done = start // row * packed.bitmask.shape[1]
            writer.write(f"{self.module}.bitmask", done, packed.bitmask)


class Unpack(base.Unpack):
    """Decodes a 2:4 weight."""

    storage = layout.NAME

    def check_shapes(self, shape: list[int]) -> None:
        layout.check_shapes(
            self.parts["compressed"].shape, self.parts["bitmask"].shape, shape
        )

    @property
    def shape(self) -> tuple[int, int]:
        rows, half = self.parts["compressed"].shape
        return rows, 2 * half

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        columns = self.shape[1]
        values, bitmask = self.parts["compressed"], self.parts["bitmask"]
        row, mask_row = columns // 2 * self.itemsize, bitmask.shape[1]
        with bitmask.file.open("rb", buffering=0) as masks:
            for start, block in values.blocks(row):
                half = matrix(block, columns // 2, self.itemsize)
                mask = torch.empty(len(half), mask_row, dtype=torch.uint8)
                bitmask.read(masks, start // row * mask_row, mask.view(-1))
                try:
                    weight = layout.unpack(half, mask, [len(half), columns])
                except layout.NotTwoOfFourError:
                    raise ValueError(
                        f"{self.place}: the bitmask does not have exactly two bits set "
                        "in every group of four inputs; the file is corrupt"
                    ) from None
                yield 2 * start, weight
