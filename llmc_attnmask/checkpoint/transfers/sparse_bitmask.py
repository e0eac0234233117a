"""Encode and decode weights as ``sparse-bitmask``, in blocks of rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from llmc_attnmask.checkpoint.io import files
from llmc_attnmask.checkpoint.io.files import StoredTensor, TensorSpec
from llmc_attnmask.checkpoint.io.writer import ShardWriter
from llmc_attnmask.checkpoint.layouts import sparse_bitmask as layout
from llmc_attnmask.checkpoint.layouts.bits import INTEGERS, mask_bytes, matrix, spread
from llmc_attnmask.checkpoint.transfers import base


@dataclass(frozen=True)
class Pack:
    """Encodes a weight with any mask."""

    module: str
    tensor: StoredTensor  # [R, C]
    entries: int  # that are not +0.0

    @property
    def zeros(self) -> int:
        return prod(self.tensor.shape) - self.entries

    @property
    def outputs(self) -> list[TensorSpec]:
        t, name = self.tensor, self.module
        rows, columns = t.shape
        mask = (rows, mask_bytes(columns))
        size = self.entries * t.itemsize
        return [
            TensorSpec(f"{name}.compressed", t.dtype, (self.entries,), size),
            TensorSpec(f"{name}.bitmask", "U8", mask, prod(mask)),
            TensorSpec(f"{name}.shape", "I64", (2,), 16),
            TensorSpec(f"{name}.row_offsets", "I64", (rows,), 8 * rows),
        ]

    def write(self, writer: ShardWriter) -> None:
        """Write the four tensors.

        :raises ValueError: if the weight changed after its entries were counted
        """
        rows, columns = self.tensor.shape
        writer.write(f"{self.module}.shape", 0, torch.tensor([rows, columns]))
        size = self.tensor.itemsize
        row, first = columns * size, 0
        for start, block in self.tensor.blocks(row):
            packed = layout.pack(matrix(block, columns, size))
            done, last = start // row, first + len(packed.compressed)
            if last <= self.entries:
                writer.write(
                    f"{self.module}.compressed", first * size, packed.compressed
                )
            mask_row = packed.bitmask.shape[1]
            writer.write(f"{self.module}.bitmask", done * mask_row, packed.bitmask)
            offsets = packed.row_offsets + first
            writer.write(f"{self.module}.row_offsets", 8 * done, offsets)
            first = last
        if first != self.entries:
            raise ValueError(
                f"{self.tensor.name} in {self.tensor.file} had {self.entries} entries "
                f"that are not +0.0, and now has {first}: the file changed while it "
                "was read"
            )


class Unpack(base.Unpack):
    """Decodes a weight with any mask."""

    storage = layout.NAME

    def check_shapes(self, shape: list[int]) -> None:
        layout.check_shapes(
            self.parts["compressed"].shape,
            self.parts["bitmask"].shape,
            shape,
            self.parts["row_offsets"].shape,
        )

    @cached_property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.parts["shape"].load().flatten().tolist()
        return rows, columns

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        try:
            yield from self._rows()
        except layout.PartsDisagreeError as error:
            raise ValueError(f"{self.place}: {error}") from None

    def _rows(self) -> Iterator[tuple[int, Tensor]]:
        columns, size = self.shape[1], self.itemsize
        values, offsets = self.parts["compressed"], self.parts["row_offsets"]
        count, bitmask = values.shape[0], self.parts["bitmask"]
        mask_row = bitmask.shape[1]
        first = done = 0
        at_a_time = max(1, files.BLOCK // max(1, columns * size)) * mask_row
        with (
            offsets.file.open("rb", buffering=0) as of_offsets,
            values.file.open("rb", buffering=0) as of_values,
        ):
            for _, block in bitmask.blocks(mask_row, at_a_time):
                mask = block.view(-1, mask_row)
                starts = torch.empty(len(mask), dtype=torch.int64)
                offsets.read(of_offsets, 8 * done, starts.view(torch.uint8))
                last = layout.check_rows(mask, starts, columns, first, count)
                entries = torch.empty(last - first, dtype=INTEGERS[size])
                values.read(of_values, first * size, entries.view(torch.uint8))
                weight = spread(entries, mask, columns).contiguous()
                yield done * columns * size, weight
                first, done = last, done + len(mask)
        layout.check_count(first, count)
