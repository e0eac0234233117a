"""Find the best sparse weight of one Linear, to second order.

For inputs X [tokens, columns] and target outputs T [tokens, rows], the sparse W~
minimizes the error of the outputs, weighted by how much it matters downstream:

    min over W~ of  sum_t (W~ x_t - t_t)^T G (W~ x_t - t_t)
       = <G W~ H, W~> - 2 <G C, W~> + const,      H = X^T X,  C = T^T X

G [rows, rows] is the Gauss-Newton matrix of the outputs, block-diagonal with one block
per attention head; without it (G = 1) this is plain least squares. ``choose_mask``
finds which entries to keep, by ADMM as in ALPS (https://arxiv.org/abs/2406.07831, there
with G = 1), and ``solve`` finds their values, by conjugate gradients. Neither needs the
tokens again, so each costs no more than a few dozen products with H.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmc_attnmask.masks.structure import MaskStructure

_DAMPENING = 0.01  # relative to the mean diagonal of H and of G
_SOLVE_ITERATIONS = 50
# ADMM's penalty, relative to the scaled H's diagonal of 1, rises from the first to the
# last value. Measured: the final error is 1 % above that of twice the stages or
# iterations.
_FIRST_PENALTY, _LAST_PENALTY = 0.01, 1.0
_STAGES, _ITERATIONS_PER_STAGE = 20, 5


def prune(
    hessian: Tensor,
    weight: Tensor,
    structure: MaskStructure,
    sparsity: float,
    sensitivity: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the mask and the surviving weights that best replace a dense weight.

    :param hessian: H, float32 [columns, columns]
    :param weight: dense weight, float32 [rows, columns]
    :param sensitivity: blocks of G, float32 [blocks, rows / blocks, rows / blocks]
    :return: bool [rows, columns], True where kept, and float32 [rows, columns]; if
        either solver fails, everything is kept and the weights are NaN
    """
    target = weight @ hessian
    try:
        kept, start = choose_mask(
            hessian, target, weight, structure, sparsity, sensitivity
        )
        return kept, solve(hessian, target, start, kept, sensitivity)
    except torch.linalg.LinAlgError:
        everything = torch.ones_like(weight, dtype=torch.bool)
        return everything, torch.full_like(weight, torch.nan)


def choose_mask(
    hessian: Tensor,
    target: Tensor,
    weight: Tensor,
    structure: MaskStructure,
    sparsity: float,
    sensitivity: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the entries to keep, and find first values for them.

    ADMM alternates between W (the ridge solution, dense) and Z (its projection on the
    sparse matrices) with a rising penalty. Rows and columns are scaled so that G and H
    have unit diagonals.

    :param hessian: H, float32 [columns, columns]
    :param target: C, float32 [rows, columns]
    :param weight: dense weight to start from and to be pulled towards, [rows, columns]
    :param sensitivity: blocks of G, float32 [blocks, rows / blocks, rows / blocks]
    :return: the mask, bool, and the values, float32, both [rows, columns]
    :raises torch.linalg.LinAlgError: if a factorization fails
    """
    hessian, target = _damped(hessian, target, weight)
    scale = hessian.diagonal().rsqrt()
    hessian = hessian * scale * scale[:, None]
    if sensitivity is not None:
        sensitivity = _damped_blocks(sensitivity)
        target = _by_block(sensitivity, target)
        by_row = sensitivity.diagonal(dim1=-2, dim2=-1).rsqrt()
        sensitivity = sensitivity * by_row[..., None] * by_row[..., None, :]
        scale = scale * by_row.flatten()[:, None]
    target = target * scale
    ridge = _ridge(hessian, sensitivity)
    kept = torch.ones_like(weight, dtype=torch.bool)
    sparse = weight / scale
    multiplier = torch.zeros_like(sparse)
    for stage in range(_STAGES):
        share = stage / (_STAGES - 1)
        penalty = _FIRST_PENALTY * (_LAST_PENALTY / _FIRST_PENALTY) ** share
        solve_ridge = ridge(penalty)
        for _ in range(_ITERATIONS_PER_STAGE):
            dense = solve_ridge(target - multiplier + penalty * sparse)
            candidate = dense + multiplier / penalty
            kept = structure.mask(candidate.abs(), sparsity)
            sparse = candidate.masked_fill(~kept, 0.0)
            multiplier = multiplier + penalty * (dense - sparse)
    return kept, sparse * scale


def solve(
    hessian: Tensor,
    target: Tensor,
    weight: Tensor,
    kept: Tensor,
    sensitivity: Tensor | None = None,
) -> Tensor:
    """Find the best values of the kept entries, by conjugate gradients from ``weight``.

    :param hessian: H, float32 [columns, columns]
    :param target: C, float32 [rows, columns]
    :param weight: values to start from and to be pulled towards, [rows, columns]
    :param kept: bool [rows, columns]
    :param sensitivity: blocks of G, float32 [blocks, rows / blocks, rows / blocks]
    :return: float32 [rows, columns], +0.0 where not kept
    """
    hessian, target = _damped(hessian, target, weight)
    diagonal = hessian.diagonal()
    blocks = len(weight)  # every row is a separate problem
    if sensitivity is not None:
        sensitivity = _damped_blocks(sensitivity)
        target = _by_block(sensitivity, target)
        by_row = sensitivity.diagonal(dim1=-2, dim2=-1).flatten()
        diagonal = diagonal * by_row[:, None]
        blocks = len(sensitivity)

    def curved(x: Tensor) -> Tensor:
        product = x @ hessian
        if sensitivity is not None:
            product = _by_block(sensitivity, product)
        return product.masked_fill(~kept, 0.0)

    def dot(x: Tensor, y: Tensor) -> Tensor:
        by_block = (x * y).view(blocks, -1).sum(-1)
        return by_block.repeat_interleave(len(x) // blocks)[:, None]

    solution = weight.masked_fill(~kept, 0.0)
    residual = target.masked_fill(~kept, 0.0) - curved(solution)
    direction = torch.zeros_like(residual)
    previous = torch.ones_like(residual[:, :1])
    for _ in range(_SOLVE_ITERATIONS):
        scaled = residual / diagonal
        product = dot(residual, scaled)
        direction = scaled + product / previous * direction
        applied = curved(direction)
        curvature = dot(direction, applied)
        # a solved block has no direction left
        step = torch.where(curvature > 0, product / curvature, 0.0)
        solution = solution + step * direction
        residual = residual - step * applied
        previous = product.clamp_min(torch.finfo(product.dtype).tiny)
    return solution.masked_fill(~kept, 0.0)


def _damped(hessian: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Add a pull towards ``weight``, which also makes H invertible."""
    # not below 1e-12, so that inputs that are all zero leave the weight as it is
    pull = max(_DAMPENING * hessian.diagonal().mean().item(), 1e-12)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return hessian + pull * identity, target + pull * weight


def _damped_blocks(sensitivity: Tensor) -> Tensor:
    """Return the damped blocks of G, scaled to a mean diagonal of 1.

    Only the proportions of G matter.
    """
    mean = sensitivity.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-30)
    identity = torch.eye(sensitivity.shape[-1], device=sensitivity.device)
    return sensitivity / mean + _DAMPENING * identity


def _by_block(sensitivity: Tensor, x: Tensor) -> Tensor:
    """Return G X: [blocks, r, r] and [blocks * r, columns] -> [blocks * r, columns]."""
    blocks = x.view(len(sensitivity), -1, x.shape[-1])
    return (sensitivity @ blocks).view(x.shape)


Solver = Callable[[Tensor], Tensor]


def _ridge(hessian: Tensor, sensitivity: Tensor | None) -> Callable[[float], Solver]:
    """Return penalty -> (R -> the W for which G W H + penalty * W = R)."""
    identity = torch.eye(len(hessian), device=hessian.device)
    if sensitivity is None:  # an inverse for each penalty is cheaper than eigenvectors

        def by_inverse(penalty: float) -> Solver:
            factor = torch.linalg.cholesky(hessian + penalty * identity)
            inverse = torch.cholesky_inverse(factor)
            return lambda right: right @ inverse

        return by_inverse
    columns, column_vectors = torch.linalg.eigh(hessian)
    rows, row_vectors = torch.linalg.eigh(sensitivity)
    curvature = rows.flatten()[:, None] * columns

    def by_eigenvectors(penalty: float) -> Solver:
        def solve_ridge(right: Tensor) -> Tensor:
            rotated = _by_block(row_vectors.mT, right) @ column_vectors
            rotated = rotated / (curvature + penalty)
            return _by_block(row_vectors, rotated @ column_vectors.mT)

        return solve_ridge

    return by_eigenvectors
