"""A 2:4 weight in the forms that its kernels read."""

from typing import NamedTuple

import torch
from torch import Tensor

from llmc_attnmask.checkpoint import layout
from llmc_attnmask.serving.kernels import cuda_decode, cusparselt, fragments, packing
from llmc_attnmask.serving.kernels.select import Choice

_ROWS = 1024  # of a weight that are compared at once


class Forms(NamedTuple):
    """What ``op.sparse_linear`` takes of a weight [rows, K]; None where no kernel that
    was chosen reads it.
    """

    values: Tensor | None  # [rows, K/2], of a decode kernel
    indices: Tensor | None  # likewise: in which columns they are
    arrived: Tensor | None  # of the decode kernel in CUDA alone: its counters
    compressed: Tensor | None  # of cuSPARSELt
    span: int = 1  # of ``indices`` for the decode kernel in CUDA, see ``fragments``


def make(weight: Tensor, choice: Choice, largest: int) -> Forms:
    """The forms for the kernels of a choice, with all that they need at load.

    Where cuSPARSELt has the kept values, or the indices as well, in an order that the
    decode kernel knows, it reads them there; that is compared for every weight.

    :param weight: [rows, K], 2:4
    :param largest: tokens of one step
    :raises CuSparseLtError: if cuSPARSELt refuses
    """
    chosen = {choice.few, choice.many}
    compressed = None
    if "cusparselt" in chosen:
        fewest = choice.tokens + 1
        compressed = cusparselt.compress(weight.contiguous())
        cusparselt.prepare(
            compressed, weight.shape[1], largest=max(largest, fewest), fewest=fewest
        )
    if "cuda" in chosen:
        arrived = cuda_decode.counters(weight.shape[0], weight.device)
        if compressed is not None and (span := shared_span(compressed, weight)):
            values, indices = _within(compressed, weight)
            return Forms(values, indices, arrived, compressed, span)
        values, indices = cuda_decode.pack(weight)
    elif "triton" in chosen:
        (values, indices), arrived = packing.pack(weight), None
    else:
        return Forms(None, None, None, compressed)
    if compressed is not None and shares_values(compressed, values):
        values, _ = _within(compressed, weight)
    return Forms(values, indices, arrived, compressed)


def shares_values(compressed: Tensor, values: Tensor) -> bool:
    """Whether cuSPARSELt's form of a weight begins with its kept values, row by row.

    :param compressed: of ``cusparselt.compress``
    :param values: [rows, K/2], of ``packing.kept``
    """
    kept = cusparselt.kept_values(compressed, 2 * values.shape[1])
    return torch.equal(layout.bits_of(kept), layout.bits_of(values))


def shared_span(compressed: Tensor, weight: Tensor) -> int | None:
    """In which spans cuSPARSELt's form of a weight has what the decode kernel in CUDA
    reads; None if in none that it knows.

    :param compressed: of ``cusparselt.compress``
    :param weight: [rows, K]
    """
    rows, columns = weight.shape
    if rows % fragments.ROWS or columns % fragments.STAGE[weight.itemsize]:
        return None
    if compressed.nbytes < weight.nbytes // 2 + rows * columns // 8:
        return None
    values, indices = _within(compressed, weight)
    for span in fragments.SPANS:
        found = fragments.nibbles(indices, rows, columns, weight.itemsize, span)
        blocks = (part.split(_ROWS) for part in (values, found, weight))
        if all(map(_same, *blocks)):
            return span
    return None


def _within(compressed: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The kept values at the head of cuSPARSELt's form, and what follows them."""
    values = cusparselt.kept_values(compressed, weight.shape[1])
    rest = compressed.view(-1).view(torch.uint8)[weight.nbytes // 2 :]
    return values, rest[: weight.numel() // 8]


def _same(values: Tensor, nibbles: Tensor, weight: Tensor) -> bool:
    if (nibbles & 3 >= nibbles >> 2).any():  # the tensor cores want them in order
        return False
    found = packing.expand(values, nibbles)
    return torch.equal(found.float(), weight.float())
