"""Keep the tensors of many calibration samples, in memory or on disk."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Literal, overload

import torch
from torch import Tensor

from llmc_attnmask.calibration.scratch import scratch

Offload = Literal["cpu", "disk"]


@dataclass(frozen=True)
class _Slot:
    """A tensor's position in the file."""

    offset: int  # bytes
    shape: torch.Size
    dtype: torch.dtype


class SampleTensors(Sequence[Tensor]):
    """A sequence of CPU tensors that may be larger than memory.

    On disk, their raw bytes are in one file in ``scratch()``. It has no name, so it
    vanishes with this object or with the process, however that ends.

    :param offload: "cpu" keeps the tensors themselves, "disk" writes them to the file
        and reads each one back when it is indexed
    """

    def __init__(self, offload: Offload = "cpu"):
        self.offload: Offload = offload
        self._slots: dict[int, Tensor | _Slot] = {}
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def append(self, tensor: Tensor) -> int:
        """Add a tensor at the end.

        :return: its index
        """
        index = len(self._slots)
        self[index] = tensor
        return index

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        """Set a tensor; each index is set once, in any order.

        :raises OSError: if the tensor does not fit into the temporary folder
        """
        tensor = tensor.detach().to("cpu")
        if self.offload == "disk":
            self._slots[index] = self._write(tensor)
        else:
            self._slots[index] = tensor

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        slot = self._slots[index]
        return self._read(slot) if isinstance(slot, _Slot) else slot

    def shape(self, index: int) -> torch.Size:
        """Return a tensor's shape without reading the tensor."""
        return self._slots[index].shape

    def _write(self, tensor: Tensor) -> _Slot:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0, dir=scratch())  # noqa: SIM115
            offset = self._file.seek(0, 2)
            rest = _bytes(tensor.contiguous())
            while rest:  # the kernel writes at most 2 GB at once
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: calibration activations do not fit into "
                f"{scratch()}; set TMPDIR to a folder on a larger disk or "
                "calibrate with fewer samples",
            ) from error
        return _Slot(offset, tensor.shape, tensor.dtype)

    def _read(self, slot: _Slot) -> Tensor:
        assert self._file is not None
        tensor = torch.empty(slot.shape, dtype=slot.dtype)
        rest = _bytes(tensor)
        self._file.seek(slot.offset)
        while rest:
            rest = rest[self._file.readinto(rest) :]  # type: ignore[attr-defined]
        return tensor


def _bytes(tensor: Tensor) -> memoryview:
    """View the memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
