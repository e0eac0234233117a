"""A 2:4 linear layer for many tokens, on the sparse tensor cores through cuSPARSELt.

This is another binding of the library that torch ships: torch's own makes a plan in
every call and never searches for the fastest algorithm. Here ``prepare`` does both once
per shape, when a model is loaded; ``linear`` then only launches, eagerly or into a CUDA
graph.
"""

from functools import lru_cache

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels.cusparselt.engine import Engine
from llmc_attnmask.serving.kernels.cusparselt.library import (
    CuSparseLtError,
    Library,
    UnusableLibraryError,
)

__all__ = [
    "LARGEST_TOKENS",
    "MULTIPLE",
    "CuSparseLtError",
    "available",
    "compress",
    "fits",
    "kept_values",
    "linear",
    "prepare",
    "version",
    "why_not",
]

MULTIPLE = {2: (16, 8), 1: (32, 16)}  # of rows and columns, of tokens; by item size
LARGEST_TOKENS = 8192  # of one launch, unless ``prepare`` is given another number


def available() -> bool:
    """Return whether this torch build and machine have the library."""
    return why_not() is None


def why_not() -> str | None:
    """Return what this machine lacks; None if ``available``."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "torch sees no CUDA GPU"
    return _loaded()[1]


def version() -> str | None:
    """Return the library's version, as ``0.8.0``; None unless ``available``."""
    if not available():
        return None
    return engine().library.version


def engine() -> Engine:
    """Return the engine with this process's plans.

    :raises UnusableLibraryError: if the library that torch ships cannot be used
    """
    found, reason = _loaded()
    if found is None:
        raise UnusableLibraryError(reason)
    return found


@lru_cache(maxsize=1)
def _loaded() -> tuple[Engine | None, str | None]:
    try:
        return Engine(Library.of_torch()), None
    except UnusableLibraryError as error:
        return None, str(error)


def fits(rows: int, columns: int, itemsize: int) -> bool:
    """Return whether the library takes a weight of this shape."""
    multiple = MULTIPLE[itemsize][0]
    return rows % multiple == 0 and columns % multiple == 0


def compress(weight: Tensor) -> Tensor:
    """Return the library's own form of a 2:4 weight.

    It begins with the kept values, followed by the library's metadata.

    :param weight: [rows, K] in fp16, bf16, int8 or fp8, contiguous, on a GPU
    :return: [rows, 9/16 K or more], for 8 bits [rows, 10/16 K or more]; the library
        decides how much it needs
    :raises ValueError: for another dtype
    :raises CuSparseLtError: if the library refuses, as it does a shape that does not
        fit
    """
    return engine().compress(weight)


def kept_values(compressed: Tensor, columns: int) -> Tensor:
    """View the first K/2 columns' worth of ``compressed`` as [rows, K/2].

    Where these are the kept values row by row, the decode kernel may read them here.

    :param columns: K
    """
    rows = compressed.shape[0]
    return compressed.view(-1)[: rows * columns // 2].view(rows, -1)


def prepare(
    compressed: Tensor,
    columns: int,
    *,
    largest: int = LARGEST_TOKENS,
    fewest: int = 1,
    search: bool = True,
) -> None:
    """Prepare what ``linear`` needs for a weight of this shape and type.

    Call it once per layer after ``compress``. Layers of the same shape and type share
    the result, so only the first call takes time. Never call it while a CUDA graph is
    captured.

    :param compressed: from ``compress``
    :param columns: K
    :param largest: most tokens of one launch; ``linear`` splits more into pieces
    :param fewest: fewest tokens that ``linear`` will usually get; fewer still work
    :param search: whether to search for the fastest algorithms, for about 20 seconds
        over all shapes of this process
    :raises CuSparseLtError: if the library refuses
    :raises RuntimeError: while a CUDA graph is captured
    """
    engine().prepare(compressed, columns, largest=largest, fewest=fewest, search=search)


def linear(
    x: Tensor,
    compressed: Tensor,
    channel_scale: Tensor | None,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply: ``x W^T`` for a compressed W of x's dtype.

    Both scales are needed with 8 bits, and neither with 16.

    :param x: [tokens, K], contiguous
    :param compressed: from ``compress``, after ``prepare`` for its shape and type
    :param channel_scale: fp32 [rows], contiguous, of an 8-bit weight
    :param token_scale: fp32 [tokens], of an 8-bit x
    :param bias: [rows] in ``out_dtype``
    :return: [tokens, rows] in ``out_dtype``, which is x's dtype in 16 bits
    :raises RuntimeError: for a shape and type without a call of ``prepare``
    """
    return engine().linear(x, compressed, channel_scale, token_scale, bias, out_dtype)
