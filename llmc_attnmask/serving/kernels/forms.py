"""Convert a 2:4 weight to the forms that its kernels read."""

from typing import NamedTuple

import torch
from torch import Tensor

from llmc_attnmask.checkpoint.layouts.bits import bits_of
from llmc_attnmask.serving.kernels import cuda_decode, cusparselt, fragments, packing
from llmc_attnmask.serving.kernels.select import Choice

_ROWS = 1024  # of a weight, compared at once


class Forms(NamedTuple):
    """The tensors of a weight [rows, K] that ``op.sparse_linear`` takes.

    Those that no chosen kernel reads are None.
    """

    values: Tensor | None  # [rows, K/2], for a decode kernel
    indices: Tensor | None  # for a decode kernel: the columns of the values
    arrived: Tensor | None  # counters, for the CUDA decode kernel only
    compressed: Tensor | None  # for cuSPARSELt
    span: int = 1  # of ``indices``, for the CUDA decode kernel; see ``fragments``


def make(weight: Tensor, choice: Choice, largest: int) -> Forms:
    """Make the forms for the chosen kernels, and prepare the kernels for them.

    Where cuSPARSELt stores the kept values, or the indices as well, in an order that
    the decode kernel can read, the kernel reads them there. Every weight is compared
    to find out.

    :param weight: [rows, K], 2:4
    :param largest: the most tokens of one step
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
    """Return whether cuSPARSELt's form begins with the kept values, row by row.

    :param compressed: from ``cusparselt.compress``
    :param values: [rows, K/2], from ``packing.kept``
    """
    kept = cusparselt.kept_values(compressed, 2 * values.shape[1])
    return torch.equal(bits_of(kept), bits_of(values))


def shared_span(compressed: Tensor, weight: Tensor) -> int | None:
    """Return the span with which the CUDA decode kernel can read cuSPARSELt's form.

    It is None if the kernel cannot read this form of the weight.

    :param compressed: from ``cusparselt.compress``
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
    """View the kept values at the start of cuSPARSELt's form, and what follows them."""
    values = cusparselt.kept_values(compressed, weight.shape[1])
    rest = compressed.view(-1).view(torch.uint8)[weight.nbytes // 2 :]
    return values, rest[: weight.numel() // 8]


def _same(values: Tensor, nibbles: Tensor, weight: Tensor) -> bool:
    if (nibbles & 3 >= nibbles >> 2).any():  # the tensor cores need them in order
        return False
    found = packing.expand(values, nibbles)
    return torch.equal(found.float(), weight.float())
