"""The operator of layers on CPU kernels: opaque to torch.compile, and cheap to call."""

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels.cpu import library

_NAMESPACE = torch.library.Library("llmc_attnmask", "FRAGMENT")
# not torch.library.custom_op, whose wrapper costs more than a small layer
_NAMESPACE.define(
    "cpu_sparse_linear(Tensor x, int rows, int columns, Tensor? tiles, Tensor? masks, "
    "Tensor? values, Tensor? starts, Tensor? channel_scales, Tensor? row_sums, "
    "Tensor? token_scales, Tensor? zero_points, Tensor? bias) -> Tensor"
)


def cpu_sparse_linear(
    x: Tensor,
    rows: int,
    columns: int,
    tiles: Tensor | None,
    masks: Tensor | None,
    values: Tensor | None,
    starts: Tensor | None,
    channel_scales: Tensor | None = None,
    row_sums: Tensor | None = None,
    token_scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply: ``x W^T + bias``, for a form of W from ``weights``.

    With int8 activations, ``scale (x - zero_point)`` of each token is what they stand
    for; sums are exact, and rounded once, after scaling.

    :param x: bf16 or int8 [tokens, columns]
    :param channel_scales: float32 [rows], of an int8 weight
    :param row_sums: int32 [rows], of an int8 weight
    :param token_scales: float32 [tokens], of int8 activations
    :param zero_points: int32 [tokens], of int8 activations; None if symmetric
    :param bias: bf16 [rows]
    :return: bf16 [tokens, rows]
    :raises MemoryError: if there is no memory for the activations
    """
    return torch.ops.llmc_attnmask.cpu_sparse_linear(
        *(x, rows, columns, tiles, masks, values, starts),
        *(channel_scales, row_sums, token_scales, zero_points, bias),
    )


def _run(
    x: Tensor,
    rows: int,
    columns: int,
    tiles: Tensor | None,
    masks: Tensor | None,
    values: Tensor | None,
    starts: Tensor | None,
    channel_scales: Tensor | None,
    row_sums: Tensor | None,
    token_scales: Tensor | None,
    zero_points: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    if x.shape[1] != columns or (bias is not None and len(bias) != rows):
        given = "no bias" if bias is None else f"a bias of {len(bias)}"
        raise ValueError(
            f"x is {list(x.shape)} with {given}, for a weight of {rows} x {columns}"
        )
    x = x.contiguous()
    out = x.new_empty(x.shape[0], rows, dtype=torch.bfloat16)
    forms = (masks, values, starts) if tiles is None else (tiles,)
    kernel = "any_mask" if tiles is None else "two_of_four"
    scales = (
        (channel_scales, row_sums, token_scales, zero_points)
        if x.dtype == torch.int8
        else ()
    )
    if x.shape[0]:
        pointer = library.pointer
        status = library.function(kernel, x.dtype)(
            *map(pointer, forms),
            *(rows, columns, x.data_ptr(), x.shape[0]),
            *map(pointer, scales),
            *(pointer(bias), out.data_ptr()),
        )
        library.check(status)
    return out


def _fake(x: Tensor, rows: int, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], rows, dtype=torch.bfloat16)


_NAMESPACE.impl("cpu_sparse_linear", _run, "CPU")
torch.library.register_fake("llmc_attnmask::cpu_sparse_linear", _fake)
