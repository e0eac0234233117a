"""Plan how sparse each part of a model becomes, within a budget.

A plan measures what pruning each group of Linears costs (``sensitivity.py``), chooses
what the groups become (``trade_off.py``) and writes that as an ordinary recipe
(``planned_recipe.py``). A group is what a server keeps in one matrix: q, k and v, o,
gate and up, or down, of one layer. If unstructured, it is a Linear, or those that one
``AttentionMatrixPruningModifier`` prunes alike. All experts of a layer count as one.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import Tensor
from transformers import PreTrainedModel

from llmc_attnmask.calibration.memory import reuse_freed_memory
from llmc_attnmask.calibration.samples import Offload
from llmc_attnmask.checkpoint.io.atomic import PROGRESS
from llmc_attnmask.checkpoint.source import read_config, read_tokenizer
from llmc_attnmask.distributed import world_size
from llmc_attnmask.oneshot.calibration_data import CalibrationData, Dataset
from llmc_attnmask.oneshot.costs import COSTS, measured_costs
from llmc_attnmask.oneshot.curve import Point, choices_of, expectation, points
from llmc_attnmask.oneshot.depth import weighed_by_depth
from llmc_attnmask.oneshot.fingerprint import fingerprint
from llmc_attnmask.oneshot.loading import loaded
from llmc_attnmask.oneshot.pilot import (
    PILOT,
    Pilot,
    pilot_key,
    pilot_sparsity,
    run_pilot,
)
from llmc_attnmask.oneshot.planned_recipe import PlannedRecipe, model_identity
from llmc_attnmask.oneshot.recipe import find_recipe
from llmc_attnmask.oneshot.sensitivity import Sensitivity
from llmc_attnmask.oneshot.trade_off import Budget, Costs, TradeOff, check_budget
from llmc_attnmask.runlog.progress import Progress
from llmc_attnmask.text.windows import window_length

PLAN_SAMPLES = 32  # windows that groups are pruned on
_HELD_OUT, _LONGEST = 8, 256  # windows that losses are measured on, and their tokens


@dataclass(frozen=True)
class Plan:
    """What was measured, and what was chosen."""

    recipe: Path
    budget: Budget
    entries: dict[str, int]  # group -> weights
    costs: Costs  # group -> sparsity -> nats per token
    chosen: Point
    curve: list[Point]
    left: float  # of SparseGPT's loss by the recipe, on a few blocks


def plan(
    model: str | Path,
    recipe: str | Path,
    output: str | Path,
    dataset: Dataset | None = None,
    *,
    dense_share: float | None = None,
    sparsity: float | None = None,
    size: float | None = None,
    loss: float | None = None,
    text_column: str = "text",
    num_samples: int = PLAN_SAMPLES,
    max_length: int | None = None,
    seed: int = 0,
    offload_activations: Offload = "cpu",
    resume: bool = False,
) -> Plan:
    """Choose how sparse each group of a recipe's Linears becomes; write that recipe.

    What a group costs is measured with SparseGPT on ``num_samples`` windows, as the KL
    divergence on 8 further windows. How much of such a loss the recipe leaves is
    measured on a few blocks, which it prunes first. With an "N:M" structure a group
    becomes sparse or stays dense; if unstructured, it gets a sparsity from 0.1 to 0.8,
    or stays dense.

    :param model: local folder or Hub name
    :param recipe: YAML file, or the name of a recipe that the package ships
    :param output: file to create, a recipe for the same model
    :param dataset: calibration data, as for ``prune``
    :param dense_share: budget: share of the weights that stay dense
    :param sparsity: budget: share of all weights that is pruned
    :param size: budget: bytes of the weights, packed, over those of the dense ones
    :param loss: budget: rise of the perplexity after the recipe, 0.05 for 5 %
    :param text_column: key of the text in the rows of the datasets
    :param num_samples: windows that groups are pruned on
    :param max_length: tokens per window; by default 2048 or, if less, the model's
        number of positions. Losses are measured on at most 256 tokens of a window
    :param seed: of the model's own answers and of the pilot run
    :param offload_activations: where activations are kept
    :param resume: continue an interrupted plan with the same arguments
    :return: the measurements and the choice
    :raises FileExistsError: if the output exists
    :raises ValueError: for bad input, and for a budget that cannot be met; the message
        says what can. ``RecipeError`` and ``DatasetError`` are such errors
    """
    output = Path(output)
    folder = output.parent / f".{output.name}.progress"
    budget = budget_of(dense_share=dense_share, sparsity=sparsity, size=size, loss=loss)
    if budget is None:
        raise ValueError(
            "a plan needs a budget: one of dense_share, sparsity, size and loss"
        )
    _check_arguments(output, folder, resume, num_samples)
    planned = PlannedRecipe(find_recipe(recipe))
    check_budget(budget, planned.structure)

    tokenizer = read_tokenizer(model)
    config = read_config(model)
    length = window_length(config, max_length)
    count = num_samples + _HELD_OUT
    data = CalibrationData(dataset, tokenizer, text_column, count, length, seed)
    known_by = fingerprint(model, config, planned.path, data.identity, seed)
    progress = Progress(folder / PROGRESS, known_by, planned.modifiers)
    try:
        reuse_freed_memory()
        with loaded(model, config, "cpu") as first:
            windows = data.windows(first, progress)
            level = pilot_sparsity(planned.structure, budget)
            pilot = None
            if progress.read_data(pilot_key(planned, level)) is None:
                others, _ = split(windows)
                pilot = run_pilot(
                    first,
                    tokenizer,
                    planned,
                    others,
                    level,
                    seed,
                    offload_activations,
                )
        del first  # or there would be two models in memory
        with loaded(model, config, "cpu") as dense:
            made = plan_on(
                dense,
                planned,
                output,
                windows,
                budget,
                pilot,
                offload_activations,
                progress,
            )
    except BaseException as error:
        if any((folder / PROGRESS).glob(f"*{kind}*") for kind in (COSTS, PILOT)):
            error.add_note(
                f"what is measured is kept in {folder}: the same command with --resume "
                "continues from there, with any budget"
            )
        elif isinstance(error, ValueError) and not resume:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        progress.close()
    shutil.rmtree(folder, ignore_errors=True)
    return made


def plan_on(
    model: PreTrainedModel,
    planned: PlannedRecipe,
    output: Path,
    windows: Tensor,
    budget: Budget,
    pilot: Pilot | None = None,
    offload: Offload = "cpu",
    progress: Progress | None = None,
) -> Plan:
    """Plan a recipe for a model in memory, which is left changed, on given windows.

    :param windows: int64 [windows, length]; 8 at equal spacing measure losses, and the
        groups are pruned on the others
    :param pilot: run on the latter; without it, the recipe is expected to leave what
        the progress says, or else what SparseGPT does
    :param progress: keeps what is measured, block by block
    """
    identity = model_identity(model)
    linearize_moe(model)
    groups = planned.groups(model)
    trade_off = TradeOff(entries_of(model, groups), planned.structure)
    sensitivity = Sensitivity(
        model,
        *split(windows),
        groups,
        planned.structure,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        offload,
    )
    key = pilot_key(planned, pilot_sparsity(planned.structure, budget))
    left = _left(sensitivity, pilot, key, progress)
    costs = measured_costs(sensitivity, trade_off.measured, progress)
    weighed = costs
    if planned.recovers:
        weighed = weighed_by_depth(costs, sensitivity.groups)
    measured = partial(points, sensitivity, trade_off, costs, weighed)
    choices = choices_of(trade_off, weighed)
    if budget.kind != "loss":
        wanted = trade_off.choose(budget, weighed)
        curve = measured(choices if wanted in choices else [*choices, wanted])
        expected = expectation(curve, left)
    else:  # what to choose is known only from the curve
        curve = measured(choices)
        expected = expectation(curve, left)
        wanted = trade_off.smallest(budget.value, weighed, expected)
        if wanted not in choices:
            curve += measured([wanted])
    curve = [replace(point, expected=expected(point.weighed)) for point in curve]
    curve.sort(key=lambda point: point.size)
    chosen = next(point for point in curve if point.sparsities == wanted)
    made = Plan(output, budget, trade_off.entries, costs, chosen, curve, left)
    summary = {"model": identity, **_summary(made)}
    planned.write(output, model, groups, chosen.sparsities, summary)
    return made


def split(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows that groups are pruned on, and those that measure losses."""
    count = len(windows)
    held_out = torch.linspace(0, count - 1, _HELD_OUT).round().long()
    others = torch.ones(count, dtype=torch.bool).index_fill(0, held_out, False)
    return windows[others], windows[held_out, :_LONGEST]


def _left(
    sensitivity: Sensitivity,
    pilot: Pilot | None,
    key: str,
    progress: Progress | None,
) -> float:
    """Return the share of SparseGPT's loss that a pilot has left."""
    if progress is not None and (known := progress.read_data(key)) is not None:
        return float(known)
    if pilot is None:
        return 1.0
    (sparsegpt,) = sensitivity.together([pilot.sparsities])
    loss = sensitivity.of_weights(pilot.weights)
    left = loss.kl / sparsegpt.kl if sparsegpt.kl > 0 else 1.0
    if progress is not None:
        progress.save_data(key, left)
    return left


def budget_of(**given: float | None) -> Budget | None:
    """Return the budget among the kinds that are given; None if there is none.

    :raises ValueError: if there are several
    """
    named = {kind: value for kind, value in given.items() if value is not None}
    if len(named) > 1:
        raise ValueError(
            f"{' and '.join(named)} are given; a plan has one budget, and the others "
            "follow from it"
        )
    for kind, value in named.items():
        return Budget(kind, value)  # type: ignore[arg-type]
    return None


def _check_arguments(
    output: Path, folder: Path, resume: bool, num_samples: int
) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected at least 1")
    check_one_process()
    if not output.name:
        raise ValueError(f"output {output} is not a file; name the recipe to create")
    if output.exists():
        raise FileExistsError(f"output {output} exists; name a new file or remove it")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"output {output}: {output.parent} is not a folder")
    if folder.exists() and not resume:
        raise FileExistsError(
            f"{folder} holds an interrupted plan; run the same command with --resume "
            "to continue it, or remove the folder to start over"
        )


def check_one_process() -> None:
    """Refuse to plan in several processes.

    :raises ValueError: if there are several
    """
    if world_size() > 1:
        raise ValueError(
            f"a plan is made by one process, not by {world_size()}; run `llmc-attnmask "
            "plan` without torchrun, and prune with the recipe that it writes"
        )


def entries_of(
    model: PreTrainedModel, groups: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """Return the number of weights of each group."""
    return {
        group: sum(model.get_parameter(f"{name}.weight").numel() for name in names)
        for group, names in groups.items()
    }


def _summary(plan: Plan) -> dict[str, Any]:
    """Return what the recipe says about the plan, as YAML values."""
    chosen = plan.chosen
    return {
        "budget": str(plan.budget),
        "size": round(chosen.size, 4),
        "dense_share": round(chosen.dense_share, 4),
        "sparsity": round(chosen.sparsity, 4),
        "left": round(plan.left, 4),
        "expected_rise": round(chosen.expected, 4),
        "curve": [
            {
                "size": round(p.size, 4),
                "predicted": round(p.predicted, 5),
                "measured": round(p.measured, 5),
                "expected_rise": round(p.expected, 4),
            }
            for p in plan.curve
        ],
    }
