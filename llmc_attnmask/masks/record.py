"""Remember a Linear's pruning mask on the Linear itself, one bit per entry.

Zeros alone do not show what was pruned: quantization rounds survivors to zero, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

_ATTRIBUTE = "_llmc_attnmask_kept"


@dataclass(frozen=True)
class _Bits:
    packed: np.ndarray  # uint8 [ceil(rows * columns / 8)], row-major
    shape: tuple[int, ...]


def set_mask(linear: nn.Module, kept: Tensor) -> None:
    """Remember the mask of a pruned module.

    What was pruned before stays pruned: only entries that both masks keep remain.
    The mask is a plain attribute, not a buffer, so it neither moves with the module nor
    is saved with it, but copies of the module have it.

    :param kept: bool, shape of the weight, True where an entry survives
    :raises ValueError: if it is not a mask of that shape
    """
    shape = tuple(cast(Tensor, linear.weight).shape)
    if kept.dtype != torch.bool or tuple(kept.shape) != shape:
        raise ValueError(
            f"a {kept.dtype} tensor of shape {tuple(kept.shape)} is not a mask for "
            f"this weight; expected torch.bool and {shape}"
        )
    if (earlier := get_mask(linear)) is not None:
        kept = kept.cpu() & earlier
    setattr(linear, _ATTRIBUTE, _Bits(to_bits(kept), shape))


def get_mask(linear: nn.Module) -> Tensor | None:
    """Return the remembered mask: bool, shape of the weight, on the CPU; or None."""
    bits = getattr(linear, _ATTRIBUTE, None)
    return None if bits is None else from_bits(bits.packed, bits.shape)


def count_violations(linear: nn.Module) -> int:
    """Count a module's pruned entries that are no longer zero; 0 without a mask.

    Packed bits are compared, because whole models are checked again and again.
    """
    bits = getattr(linear, _ATTRIBUTE, None)
    if bits is None or tuple(cast(Tensor, linear.weight).shape) != bits.shape:
        return 0
    wrong = to_bits(cast(Tensor, linear.weight).detach().bool()) & ~bits.packed
    return int(np.unpackbits(wrong).sum(dtype=np.int64)) if wrong.any() else 0


def clear_mask(linear: nn.Module) -> None:
    """Forget the remembered mask, if any."""
    if hasattr(linear, _ATTRIBUTE):
        delattr(linear, _ATTRIBUTE)


def to_bits(flags: Tensor) -> np.ndarray:
    """Pack a bool tensor, one bit per entry: uint8 [ceil(entries / 8)], row-major."""
    return np.packbits(flags.detach().cpu().numpy().ravel(), bitorder="little")


def from_bits(bits: np.ndarray, shape: Sequence[int]) -> Tensor:
    """Return the bool tensor that ``to_bits`` packed, on CPU."""
    flags = np.unpackbits(bits, count=prod(shape), bitorder="little")
    return torch.from_numpy(flags.view(bool)).view(*shape)
