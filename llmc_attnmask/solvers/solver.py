"""Prune the projections of one attention layer by the error of its attention.

There are two modes. Both minimize an error of the attention matrix or output
(``objective.py``), first for q and k, then for v and o.

Light mode leaves the surviving weights as they are and learns the masks M by gradient
descent (``modes.py``, ``descent.py``):

    min over M  of  error(M o W) + lambda/2 * mean(M^2)

M is relaxed (``relaxation.py``). Adam moves its scores on mini-batches of calibration
samples, and the temperature falls until the relaxed mask is hard.

Accuracy mode solves for the mask and the surviving weights on the error's second-order
expansion (``least_squares.py``), then moves the weights by gradient descent.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from loguru import logger
from torch import Tensor

from llmc_attnmask.attention.matrix import AttentionNorms
from llmc_attnmask.attention.projections import Role
from llmc_attnmask.distributed import owner, rank, send_from
from llmc_attnmask.solvers import least_squares
from llmc_attnmask.solvers.attention_layer import AttentionLayer
from llmc_attnmask.solvers.descent import descend
from llmc_attnmask.solvers.matrix_objective import MatrixObjective
from llmc_attnmask.solvers.modes import AccuracyMode, LightMode, Mode, Tensors, pruned
from llmc_attnmask.solvers.objective import Curvature, Objective
from llmc_attnmask.solvers.output_objective import OutputObjective
from llmc_attnmask.solvers.settings import SolverSettings
from llmc_attnmask.solvers.wanda import wanda_scores

_CHECKS = 8  # how often the result is measured on the validation samples
_PATIENCE = 4  # checks without a better result that end a descent with hard masks

# dense weight [rows, columns], X^T X [columns, columns] -> pruned weight
Baseline = Callable[[Tensor, Tensor], Tensor]


@dataclass
class MaskSolution:
    """Hard masks and pruned weights of some projections."""

    masks: Tensors  # bool [rows, columns], True where a weight is kept
    weights: Tensors  # [rows, columns], +0.0 where pruned
    start_error: float  # of the start, on the validation samples
    error: float  # of what is returned, on the same samples
    curve: list[float] = field(default_factory=list)  # training loss per step
    # for q and k: relative errors of the attention matrix and of what reaches the
    # output, on the same samples, by method; this solution is "ours"
    compared: dict[str, AttentionNorms] = field(default_factory=dict)
    fallback: str | None = None  # what was not finite, if anything


def learn_masks(
    layer: AttentionLayer,
    prune: Sequence[Role],
    settings: SolverSettings,
    baselines: Mapping[str, Baseline] | None = None,
) -> list[MaskSolution]:
    """Learn masks for some projections, never worse than the start.

    The start is Wanda's mask, or the second-order solution in accuracy mode.

    :param prune: the projections to prune
    :param baselines: other methods by name, compared with the solution for q and k
    :return: one solution for q and k, on the attention matrix, and one for v and o, on
        the attention output; only for what ``prune`` names
    :raises ValueError: if the error of the start is not finite
    """
    solutions: list[MaskSolution] = []
    weights: Tensors = {}
    if roles := [role for role in prune if role in ("q", "k")]:
        matrix = MatrixObjective(
            layer, roles, settings.output_weight, settings.batch_size
        )
        curvature = matrix.curvature()
        found = _learn(matrix, curvature, settings)
        if baselines:
            found.compared = _compare(matrix, curvature, found.weights, baselines)
        solutions.append(found)
        weights = found.weights
    if rest := [role for role in prune if role in ("v", "o")]:
        output = OutputObjective(layer, rest, weights, settings.batch_size)
        solutions.append(_learn(output, output.curvature(), settings))
    return solutions


def combined(solutions: Sequence[MaskSolution]) -> tuple[Tensors, Tensors]:
    """Return the masks and the weights of all solutions, by projection."""
    masks: Tensors = {}
    weights: Tensors = {}
    for solution in solutions:
        masks |= solution.masks
        weights |= solution.weights
    return masks, weights


def _compare(
    objective: MatrixObjective,
    curvature: Curvature,
    ours: Tensors,
    baselines: Mapping[str, Baseline],
) -> dict[str, AttentionNorms]:
    """Return the errors of this solution and of the baselines, if they are finite."""
    candidates = {"ours": ours}
    for name, baseline in baselines.items():
        candidates[name] = {
            role: baseline(objective.layer.dense(role), hessian)
            for role, (hessian, _) in curvature.items()
        }
    errors = objective.validation_errors(list(candidates.values()))
    return {
        name: found
        for name, found in zip(candidates, errors, strict=True)
        if all(map(math.isfinite, found))
    }


def _learn(
    objective: Objective, curvature: Curvature, settings: SolverSettings
) -> MaskSolution:
    scores = {
        role: _even_scores(objective.layer.dense(role), hessian)
        for role, (hessian, _) in curvature.items()
    }
    solution, values = _start(objective, curvature, scores, settings)
    structure, sparsity = settings.structure, settings.sparsity
    if all(
        structure.kept(score, sparsity) in (0, structure.groups(score).shape[-1])
        for score in scores.values()
    ):
        return solution  # nothing to choose
    mode: Mode
    if settings.update_weights:
        mode = AccuracyMode(objective, solution.masks, values)
    else:
        mode = LightMode(objective, settings, scores)
    _improve(solution, objective, mode, settings)
    return solution


def _start(
    objective: Objective,
    curvature: Curvature,
    scores: Tensors,
    settings: SolverSettings,
) -> tuple[MaskSolution, Tensors]:
    """Return the measured start, and its weights [rows, columns] before masking.

    :raises ValueError: if its error is not finite
    """
    fallback: str | None = None
    if settings.update_weights:
        masks, values = _second_order(objective, curvature, settings)
        weights = pruned(masks, values)
        error = objective.validation_error(weights)
        if math.isfinite(error):
            return MaskSolution(masks, weights, error, error), values
        fallback = f"the error of the second-order solution is {error}"
        logger.warning(f"{fallback}; Wanda's mask instead")
    masks = {role: settings.mask(score) for role, score in scores.items()}
    values = {role: objective.layer.dense(role) for role in scores}
    if settings.update_weights:  # they will move
        values = {role: value.clone() for role, value in values.items()}
    weights = pruned(masks, values)
    error = objective.validation_error(weights)
    if not math.isfinite(error):
        raise ValueError(
            f"the attention error is {error} before any step: the calibration inputs "
            "or the weights overflow or are not finite"
        )
    return MaskSolution(masks, weights, error, error, fallback=fallback), values


def _second_order(
    objective: Objective, curvature: Curvature, settings: SolverSettings
) -> tuple[Tensors, Tensors]:
    """Return the masks and weights [rows, columns] that are best to second order.

    The ranks share out the projections. If the solver fails, the weights are NaN.
    """
    masks: Tensors = {}
    values: Tensors = {}
    for position, (role, (hessian, sensitivity)) in enumerate(curvature.items()):
        weight = objective.layer.dense(role)
        masks[role], values[role] = torch.ones_like(weight, dtype=torch.bool), weight
        if owner(position) == rank():
            masks[role], values[role] = least_squares.prune(
                hessian, weight, settings.structure, settings.sparsity, sensitivity
            )
        masks[role] = send_from(owner(position), masks[role])
        values[role] = send_from(owner(position), values[role])
    return masks, values


def _even_scores(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return Wanda's scores [rows, columns], scaled to a mean of 1 in each row."""
    score = wanda_scores(weight, hessian)
    return score / score.mean(-1, keepdim=True).clamp_min(1e-30)


def _improve(
    solution: MaskSolution, objective: Objective, mode: Mode, settings: SolverSettings
) -> None:
    """Descend, and leave in ``solution`` what is best on the validation samples.

    The descent ends early if the error stalls.
    """
    stalled = 0
    check_every = max(1, settings.steps // _CHECKS)

    def validate(step: int, loss: float) -> bool:
        nonlocal stalled
        solution.curve.append(loss)
        if (step + 1) % check_every and step + 1 < settings.steps:
            return False
        masks, weights = mode.hard()
        error = objective.validation_error(weights)
        if error < solution.error:
            solution.masks, solution.weights, solution.error = masks, weights, error
            stalled = 0
        elif step / settings.steps >= mode.settled:
            stalled += 1
        return stalled == _PATIENCE

    fault = descend(
        mode.learned, objective.train, mode.differentiate, settings, validate
    )
    if fault:
        solution.fallback = fault
        logger.warning(f"{solution.fallback}; the best mask so far stays")
