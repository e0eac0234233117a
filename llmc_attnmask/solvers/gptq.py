"""GPTQ that keeps exact zeros, in two steps: projection, then coordinate descent.

It finds values q on the grid of the scales, zero wherever w is zero, that minimize

    tr (q - w) H (q - w)^T,      H = X^T X + dampening

GPTQ goes through the columns once and lets the remaining columns compensate for each
rounding error. The projection does the same with q = 0 at pruned entries, so that what
these should have compensated for is passed on as well. But it is passed on late:
earlier columns had counted on them. Coordinate descent corrects this: it sweeps over
the columns and rounds each entry again, to the best value given all others. No step
raises the error above.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationStrategy,
    fake_quantize,
)
from llmcompressor.modifiers.gptq.gptq_quantize import (
    quantize_weight as stock_quantize_weight,
)
from llmcompressor.modifiers.gptq.helpers import (
    GPTQ_PRECISION,
    apply_activation_ordering,
    column_scale_window,
    factorize_hessian,
)
from torch import Tensor

_SWEEPS = 4  # measured: docs/masked-gptq.md


def quantize_weight(
    weights: Tensor,
    hessians: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    global_scale: Tensor | None,
    quant_args: QuantizationArgs,
    blocksize: int = 128,
    percdamp: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize as llm-compressor's function of this name, but keep exact zeros as +0.0.

    Weights without zeros are passed to that function: results are the same to the bit.
    The others are quantized one at a time, as the descent needs a copy of the Hessian.

    :param weights: float32 [batch, rows, columns]; overwritten
    :param hessians: float32 [batch, columns, columns]; overwritten
    :param scale: from the observers, [batch, ...] by strategy
    :param zero_point: from the observers, [batch, ...] by strategy
    :param percdamp: dampening, relative to the mean diagonal of H
    :return: weights on their grids [batch, rows, columns]; loss [batch]; and whether
        the Hessian could not be inverted, so that weights were rounded to the nearest
        value, [batch]
    """
    sparse = (weights == 0).flatten(1).any(dim=1)
    results: list[tuple[Tensor, Any]] = []
    for chosen in [(~sparse).nonzero().flatten(), *sparse.nonzero()]:
        if not len(chosen):
            continue
        # a slice makes no copies
        part = slice(None) if len(chosen) == len(weights) else chosen
        quantize = _quantize_sparse if sparse[chosen[0]] else stock_quantize_weight
        result = quantize(
            weights=weights[part],
            hessians=hessians[part],
            scale=scale[part],
            zero_point=zero_point[part],
            global_scale=None if global_scale is None else global_scale[part],
            quant_args=quant_args,
            blocksize=blocksize,
            percdamp=percdamp,
        )
        results.append((chosen, result))
    if len(results) == 1:
        return results[0][1]
    order = torch.cat([chosen for chosen, _ in results]).argsort()
    quantized, losses, fallbacks = (
        torch.cat([result[i] for _, result in results])[order] for i in range(3)
    )
    return quantized, losses, fallbacks


def _quantize_sparse(
    *,
    weights: Tensor,
    hessians: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    global_scale: Tensor | None,
    quant_args: QuantizationArgs,
    blocksize: int,
    percdamp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    device, dtype = weights.device, weights.dtype
    _, rows, columns = weights.shape
    weights, hessians, order = apply_activation_ordering(
        weights.to(GPTQ_PRECISION), hessians.to(GPTQ_PRECISION), quant_args.actorder
    )
    groups = _groups(quant_args, columns, order, device)
    factors, zeros = column_scale_window(
        scale.to(device),
        zero_point.to(device),
        None if global_scale is None else global_scale.to(device),
        groups,
        quant_args,
        num_rows=rows,
        i1=0,
        i2=columns,
    )
    by_column = copy(quant_args)
    by_column.strategy = QuantizationStrategy.CHANNEL
    grid = _Grid(
        weights[0] != 0, factors[0], None if zeros is None else zeros[0], by_column
    )

    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0  # inputs that are always zero; GPTQ drops their weights, too
    diagonal.masked_fill_(dead, 1.0)
    diagonal.add_(percdamp * diagonal.mean())
    target = weights[0].masked_fill(dead, 0.0)
    hessian = hessians[0].clone()
    fallback = torch.zeros(1, dtype=torch.bool, device=device)
    inverse = factorize_hessian(weights, hessians, 0.0, fallback)[0]

    quantized = _project(target.clone(), inverse, grid, blocksize)
    if not fallback:
        for _ in range(_SWEEPS):
            if not _coordinate_descent(quantized, target, hessian, grid, blocksize):
                break
    error = quantized - target
    loss = ((error @ hessian) * error).sum() / 2
    if order is not None:
        quantized = quantized[:, order[0].argsort()]
    return quantized[None].to(dtype), loss[None], fallback


def _groups(
    quant_args: QuantizationArgs,
    columns: int,
    order: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Return the group of scales of each column, int32 [columns] or [1, columns]."""
    if quant_args.strategy == QuantizationStrategy.BLOCK:
        width = quant_args.block_structure[1]
    elif quant_args.strategy in (
        QuantizationStrategy.GROUP,
        QuantizationStrategy.TENSOR_GROUP,
    ):
        width = quant_args.group_size
    else:
        return None
    groups = torch.arange(columns, device=device, dtype=torch.int) // width
    return groups if order is None else groups[order]


@dataclass(frozen=True)
class _Grid:
    """The values that each entry may take: those of its scale, or only 0 if pruned."""

    kept: Tensor  # bool [rows, columns]
    scale: Tensor  # float [rows, columns]
    zero_point: Tensor | None  # float [rows, columns]
    args: QuantizationArgs

    def round(self, values: Tensor, column: int) -> Tensor:
        """Return the nearest allowed values for one column, [rows]."""
        at = slice(column, column + 1)
        rounded = fake_quantize(
            values[:, None],
            self.scale[:, at],
            None if self.zero_point is None else self.zero_point[:, at],
            self.args,
        )[:, 0]
        return rounded.masked_fill(~self.kept[:, column], 0.0)


def _project(work: Tensor, inverse: Tensor, grid: _Grid, blocksize: int) -> Tensor:
    """Run GPTQ's pass over the columns, with pruned entries rounded to zero.

    :param work: weights, float32 [rows, columns]; overwritten
    :param inverse: upper Cholesky factor of H's inverse
    """
    columns = work.shape[1]
    quantized = torch.zeros_like(work)
    for start in range(0, columns, blocksize):
        end = min(start + blocksize, columns)
        errors = torch.zeros_like(work[:, start:end])
        for j in range(start, end):
            quantized[:, j] = grid.round(work[:, j], j)
            error = (work[:, j] - quantized[:, j]) / inverse[j, j]
            errors[:, j - start] = error
            work[:, j:end] -= error[:, None] * inverse[j, j:end]
        work[:, end:] -= errors @ inverse[start:end, end:]
    return quantized


def _coordinate_descent(
    quantized: Tensor, target: Tensor, hessian: Tensor, grid: _Grid, blocksize: int
) -> bool:
    """Run one sweep of coordinate descent over the columns, in place.

    :return: whether any entry changed
    """
    columns = target.shape[1]
    changed = False
    gradient = (quantized - target) @ hessian  # half the gradient
    for start in range(0, columns, blocksize):
        end = min(start + blocksize, columns)
        steps = torch.zeros_like(quantized[:, start:end])
        local = gradient[:, start:end].clone()
        for j in range(start, end):
            best = quantized[:, j] - local[:, j - start] / hessian[j, j]
            rounded = grid.round(best, j)
            step = rounded - quantized[:, j]
            steps[:, j - start] = step
            quantized[:, j] = rounded
            local += step[:, None] * hessian[j, start:end]
        gradient[:, end:] += steps @ hessian[start:end, end:]
        changed |= bool(steps.any())
    return changed
