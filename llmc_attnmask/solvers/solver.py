"""Prune the projections of one attention layer on what its attention loses.

Two modes, both on an error of the attention matrix or output (``objectives.py``), for q
and k first, then for v and o.

Light mode leaves the survivors as they are and learns the masks M by gradient descent:

    min over M  of  error(M o W) + lambda/2 * mean(M^2)

M is relaxed (``relaxation.py``), its scores follow Adam on mini-batches of calibration
samples, and the temperature falls until the relaxed mask is a hard one.

Accuracy mode solves for mask and survivors on the error's second-order expansion
(``least_squares.py``), then moves the survivors by gradient descent on the error.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from loguru import logger
from torch import Tensor

from llmc_attnmask.attention.capture import AttentionReplica
from llmc_attnmask.attention.matrix import AttentionNorms
from llmc_attnmask.attention.projections import Projection, Role
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.calibration.micro_batches import minibatches
from llmc_attnmask.distributed import owner, rank, send_from
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.solvers.least_squares import choose_mask, solve
from llmc_attnmask.solvers.numerics import non_finite
from llmc_attnmask.solvers.objectives import (
    Curvature,
    MatrixObjective,
    Objective,
    OutputObjective,
)
from llmc_attnmask.solvers.relaxation import soft_top_k

_CHECKS = 8  # how often the result is measured on the held-back samples
_PATIENCE = 4  # checks without a better result, masks being hard, that end the descent
_ANNEALED = 0.8  # share of the steps in which the temperature falls
_HOT, _COLD = 1.0, 0.05  # temperatures, in units of the mean score
_SURVIVOR_STEP = 0.01  # Adam's step of surviving weights, in standard deviations of W

Tensors = dict[Role, Tensor]
# dense weight [rows, columns], X^T X [columns, columns] -> pruned weight
Baseline = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SolverSettings:
    """How the masks of a layer are learned; see the modifier for the meaning."""

    steps: int
    learning_rate: float
    batch_size: int
    l2_penalty: float
    output_weight: float
    seed: int
    update_weights: bool = False  # accuracy mode


@dataclass
class MaskSolution:
    """Hard masks of some projections, True where a weight is kept."""

    masks: Tensors
    weights: Tensors  # [rows, columns], zero where pruned
    start_error: float  # of the start, on the held-back samples
    error: float  # of what is returned, on the same samples
    curve: list[float] = field(default_factory=list)  # training loss per step
    # of q and k: relative errors of the attention matrix and of what reaches the
    # output, on the same samples, of this solution ("ours") and of other methods
    compared: dict[str, AttentionNorms] = field(default_factory=dict)
    fallback: str | None = None  # what came out as no number, if anything did


def learn_masks(
    replica: AttentionReplica,
    inputs: ModuleInputs,
    projections: Mapping[Role, Projection],
    prune: Sequence[Role],
    structure: MaskStructure,
    sparsity: float,
    settings: SolverSettings,
    baselines: Mapping[str, Baseline] | None = None,
) -> list[MaskSolution]:
    """Masks for the projections named in ``prune``; never worse than their start.

    The start is Wanda's mask, or the second-order solution if survivors are updated.

    :param replica: the attention module, with its dense weights
    :param inputs: calibration inputs of the module, at least one sample
    :param projections: all of q, k, v, o (o weighs the output error)
    :param sparsity: share of each projection's entries that is pruned
    :param baselines: other methods, by name, to compare the solution for q and k with
    :return: of q and k, on the attention matrix, and of v and o, on the attention
        output; those of them that ``prune`` names
    """
    layer = (replica, inputs, projections)
    problem = (structure, sparsity, settings)
    solutions: list[MaskSolution] = []
    pruned: Tensors = {}
    if roles := [role for role in prune if role in ("q", "k")]:
        matrix = MatrixObjective(
            *layer, roles, settings.output_weight, settings.batch_size
        )
        curvature = matrix.curvature()
        found = _learn(matrix, curvature, *problem)
        if baselines:
            found.compared = _compare(matrix, curvature, found.weights, baselines)
        solutions.append(found)
        pruned = found.weights
    if rest := [role for role in prune if role in ("v", "o")]:
        output = OutputObjective(*layer, rest, pruned, settings.batch_size)
        solutions.append(_learn(output, output.curvature(), *problem))
    return solutions


def _compare(
    objective: MatrixObjective,
    curvature: Curvature,
    ours: Tensors,
    baselines: Mapping[str, Baseline],
) -> dict[str, AttentionNorms]:
    """Errors of our weights and of other methods', as far as they are numbers."""
    candidates = {"ours": ours}
    for name, baseline in baselines.items():
        candidates[name] = {
            role: baseline(objective.dense(role), hessian)
            for role, (hessian, _) in curvature.items()
        }
    errors = objective.validation_errors(list(candidates.values()))
    return {
        name: found
        for name, found in zip(candidates, errors, strict=True)
        if all(map(math.isfinite, found))
    }


def _learn(
    objective: Objective,
    curvature: Curvature,
    structure: MaskStructure,
    sparsity: float,
    settings: SolverSettings,
) -> MaskSolution:
    dense = {role: objective.dense(role) for role in objective.roles}
    scores, masks, values = _start(objective, curvature, structure, sparsity, settings)
    weights = _pruned(masks, values)
    error = objective.validation_error(weights)
    fallback: str | None = None
    if settings.update_weights and not math.isfinite(error):
        fallback = f"the error of the second-order solution is {error}"
        logger.warning(f"{fallback}; Wanda's mask instead")
        masks = {r: structure.mask(score, sparsity) for r, score in scores.items()}
        values = {role: weight.clone() for role, weight in dense.items()}
        weights = _pruned(masks, values)
        error = objective.validation_error(weights)
    if not math.isfinite(error):
        raise ValueError(
            f"the attention error is {error} before any step: the calibration inputs "
            "or the weights overflow or are no numbers"
        )
    best = MaskSolution(masks, weights, error, error, fallback=fallback)
    kept = {role: structure.kept(w, sparsity) for role, w in dense.items()}
    entries = {role: structure.groups(w).shape[-1] for role, w in dense.items()}
    if all(kept[role] in (0, entries[role]) for role in dense):
        return best  # nothing to choose

    if settings.update_weights:
        hard = {role: mask.to(dense[role].dtype) for role, mask in masks.items()}
        spread = {role: w.std().item() for role, w in dense.items()}
        _optimize(
            objective,
            settings,
            [(values[role], _SURVIVOR_STEP * spread[role]) for role in values],
            lambda _: hard,
            lambda: masks,
            values,
            best,
            settled=0.0,
        )
        return best

    def relaxed(progress: float) -> Tensors:
        temperature = _HOT * (_COLD / _HOT) ** min(1.0, progress / _ANNEALED)
        return {
            role: soft_top_k(structure.groups(score), kept[role], temperature).view(
                score.shape
            )
            for role, score in scores.items()
        }

    def found() -> Tensors:
        return {r: structure.mask(s.detach(), sparsity) for r, s in scores.items()}

    learned = [(score, settings.learning_rate) for score in scores.values()]
    _optimize(
        objective, settings, learned, relaxed, found, values, best, settled=_ANNEALED
    )
    return best


def _start(
    objective: Objective,
    curvature: Curvature,
    structure: MaskStructure,
    sparsity: float,
    settings: SolverSettings,
) -> tuple[Tensors, Tensors, Tensors]:
    """Scores, masks and values [rows, columns] to start from."""
    scores: Tensors = {}
    masks: Tensors = {}
    values: Tensors = {}
    for position, (role, (hessian, sensitivity)) in enumerate(curvature.items()):
        weight = objective.dense(role)
        scores[role] = _wanda_scores(weight, hessian)
        masks[role] = structure.mask(scores[role], sparsity)
        values[role] = weight
        if not settings.update_weights:
            continue
        if owner(position) == rank():
            target = weight @ hessian
            try:
                masks[role], first = choose_mask(
                    hessian, target, weight, structure, sparsity, sensitivity
                )
                values[role] = solve(hessian, target, first, masks[role], sensitivity)
            except torch.linalg.LinAlgError:
                values[role] = torch.full_like(weight, math.nan)
        masks[role] = send_from(owner(position), masks[role])
        values[role] = send_from(owner(position), values[role])
    return scores, masks, values


def _wanda_scores(weight: Tensor, hessian: Tensor) -> Tensor:
    """|W| * ||x|| (arXiv 2306.11695), each row's mean brought to 1: [rows, columns]."""
    score = weight.abs() * hessian.diagonal().sqrt()
    return score / score.mean(-1, keepdim=True).clamp_min(1e-30)


def _pruned(masks: Tensors, values: Tensors) -> Tensors:
    return {r: values[r].detach().masked_fill(~m, 0.0) for r, m in masks.items()}


def _optimize(
    objective: Objective,
    settings: SolverSettings,
    learned: list[tuple[Tensor, float]],
    relaxed: Callable[[float], Tensors],
    found: Callable[[], Tensors],
    values: Tensors,
    best: MaskSolution,
    settled: float,
) -> None:
    """Follow Adam and leave in ``best`` what is best on the held-back samples.

    Ends early if that stalls.

    :param learned: tensors to move, each with Adam's first step size
    :param relaxed: progress in [0, 1) -> masks to take the error of
    :param found: the hard masks of the moment
    :param values: what the masks are laid on
    :param settled: progress from which on the masks are hard
    """
    stalled = 0
    optimizer = torch.optim.Adam(
        {"params": [tensor.requires_grad_()], "peak": peak} for tensor, peak in learned
    )
    generator = torch.Generator().manual_seed(settings.seed)
    batches = minibatches(objective.train, settings.batch_size, generator)
    check_every = max(1, settings.steps // _CHECKS)
    for step, batch in enumerate(itertools.islice(batches, settings.steps)):
        progress = step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * progress))
        with torch.enable_grad():
            masks = relaxed(progress)
            weights = {role: mask * values[role] for role, mask in masks.items()}
            loss, gradients = objective.gradient(batch, weights)
            graph = [w for w in weights.values() if w.requires_grad]
            upstream = [gradients[r] for r, w in weights.items() if w.requires_grad]
            if settings.l2_penalty:
                squares = torch.stack([m.square().mean() for m in masks.values()])
                penalty = settings.l2_penalty / 2 * squares.sum()
                loss += penalty.item()
                graph.append(penalty)
                upstream.append(torch.ones_like(penalty))
        if fault := non_finite(loss, upstream):
            best.fallback = f"step {step}: {fault}"
            logger.warning(f"{best.fallback}; the best mask so far stays")
            break
        optimizer.zero_grad()
        torch.autograd.backward(graph, upstream)
        optimizer.step()
        best.curve.append(loss)
        if (step + 1) % check_every == 0 or step + 1 == settings.steps:
            hard = found()
            weights = _pruned(hard, values)
            error = objective.validation_error(weights)
            if error < best.error:
                best.masks, best.weights, best.error = hard, weights, error
                stalled = 0
            elif progress >= settled:
                stalled += 1
            if stalled == _PATIENCE:
                break
