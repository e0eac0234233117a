"""Run a recipe on a few blocks, to see how much of SparseGPT's loss it leaves.

Recovery makes good some of what pruning has lost, also in blocks before its own, so how
much it leaves shows only where several blocks in a row are pruned. On SmolLM2-135M,
``block_2of4_quick`` leaves 0.51 of the loss that SparseGPT has with everything at 2:4,
0.50 with four blocks in a row, and 0.81 with four blocks apart from each other.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.planned_recipe import PlannedRecipe
from llmc_attnmask.oneshot.trade_off import BITMASK, Budget, Sparsities, sparsities_of
from llmc_attnmask.recovery.blockwise import block_names
from llmc_attnmask.runlog.context import described

_BLOCKS = 4  # in a row, in the middle of the model, but at most half of it


@dataclass(frozen=True)
class Pilot:
    """The weights of a few blocks that a recipe has pruned, with all others dense."""

    sparsities: Sparsities
    weights: Mapping[str, Tensor]  # name of a Linear -> [rows, columns]


def pilot_sparsity(structure: MaskStructure, budget: Budget) -> float:
    """Return a sparsity like those that a budget leads to."""
    known = sparsities_of(structure)
    wanted = {"sparsity": budget.value, "size": 1 + BITMASK - budget.value}
    return min(max(wanted.get(budget.kind, 0.5), min(known)), max(known))


def pilot_key(planned: PlannedRecipe, sparsity: float) -> str:
    """Identify what a pilot run does, apart from the model and the windows."""
    modifiers = json.dumps(described(planned.pruning), sort_keys=True)
    digest = hashlib.sha256(modifiers.encode()).hexdigest()[:8]
    return f"pilot {sparsity:g} {digest}"


def run_pilot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    planned: PlannedRecipe,
    windows: Tensor,
    sparsity: float,
) -> Pilot:
    """Run the pruning part of a recipe on some blocks of a model, which it changes.

    :param windows: int64 [windows, length], which the recipe is calibrated on
    :param sparsity: of every group in these blocks
    """
    linearize_moe(model)
    groups = planned.groups(model)
    names = block_names(model)
    count = max(1, min(_BLOCKS, len(names) // 2))
    first = (len(names) - count) // 2
    inside = tuple(f"{name}." for name in names[first : first + count])
    sparsities = {
        group: sparsity if members[0].startswith(inside) else 0.0
        for group, members in groups.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "pilot.yaml"
        planned.write(recipe, model, groups, sparsities, {})
        modifiers = PlannedRecipe(recipe).pruning
    compress(model, tokenizer, modifiers, windows)
    weights = {
        name: model.get_parameter(f"{name}.weight").detach().float().cpu()
        for group, members in groups.items()
        for name in members
        if sparsities[group]
    }
    return Pilot(sparsities, weights)
