"""Run a recipe on a few blocks, to see how much of SparseGPT's loss it leaves.

Recovery makes good some of what pruning has lost, also in blocks before its own, so how
much it leaves shows only where several blocks in a row are pruned. On SmolLM2-135M,
``block_2of4_quick`` leaves 0.51 of the loss that SparseGPT has with everything at 2:4,
0.50 with four blocks in a row, and 0.81 with four blocks apart from each other.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from compressed_tensors.utils import match_named_modules
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmc_attnmask.calibration.samples import Offload
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.modifiers.masked_recovery import MaskedRecoveryModifier
from llmc_attnmask.oneshot.compress import compress, set_defaults
from llmc_attnmask.oneshot.planned_recipe import PlannedRecipe
from llmc_attnmask.oneshot.sensitivity import Groups
from llmc_attnmask.oneshot.trade_off import BITMASK, Budget, Sparsities, sparsities_of
from llmc_attnmask.recovery.blockwise import block_names
from llmc_attnmask.runlog.context import described

PILOT = "pilot "  # begins the names of pilots' results in the progress
_BLOCKS = 4  # in a row, but at most half of the model
_FOR_A_LOSS = 0.3  # sparsity of a pilot whose budget does not say how much to prune


@dataclass(frozen=True)
class Pilot:
    """The weights of a few blocks that a recipe has pruned, with all others dense."""

    sparsities: Sparsities
    weights: Mapping[str, Tensor]  # name of a Linear -> [rows, columns]


def pilot_sparsity(structure: MaskStructure, budget: Budget) -> float:
    """Return a sparsity like those that a budget leads to.

    Recovery leaves more of a small loss than of a large one: on SmolLM2-135M, 0.49 of
    SparseGPT's at a sparsity of 0.3, and 0.40 at 0.5. A budget of loss is taken to be
    small, about 5 %; of a much larger one, too much is expected.
    """
    known = sparsities_of(structure)
    wanted = {"sparsity": budget.value, "size": 1 + BITMASK - budget.value}
    return min(max(wanted.get(budget.kind, _FOR_A_LOSS), min(known)), max(known))


def pilot_key(planned: PlannedRecipe, sparsity: float) -> str:
    """Identify what a pilot run does, apart from the model and the windows."""
    modifiers = json.dumps(described(planned.pruning), sort_keys=True)
    digest = hashlib.sha256(modifiers.encode()).hexdigest()[:8]
    return f"{PILOT}{sparsity:g} {digest}"


def run_pilot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    planned: PlannedRecipe,
    windows: Tensor,
    sparsity: float,
    seed: int = 0,
    offload: Offload | None = None,
) -> Pilot:
    """Run the pruning part of a recipe on some blocks of a model.

    :param model: has no weights afterwards, because the tracer keeps it
    :param windows: int64 [windows, length], which the recipe is calibrated on
    :param sparsity: of every group in these blocks
    :param seed: of modifiers that the recipe gives none
    :param offload: where activations are kept, if the recipe does not say it
    """
    linearize_moe(model)
    groups = planned.groups(model)
    inside = _blocks(block_names(model), groups)
    sparsities = {
        group: sparsity if members[0].startswith(inside) else 0.0
        for group, members in groups.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "pilot.yaml"
        planned.write(recipe, model, groups, sparsities, {})
        modifiers = [
            modifier
            for modifier in PlannedRecipe(recipe).pruning
            if not isinstance(modifier, MaskedRecoveryModifier)
            or _recovers(modifier, model, inside)
        ]
    set_defaults(modifiers, seed, offload)
    torch.manual_seed(seed)
    compress(model, tokenizer, modifiers, windows)
    weights = {
        name: model.get_parameter(f"{name}.weight").detach().cpu()
        for group, members in groups.items()
        for name in members
        if sparsities[group]
    }
    for module in model.modules():
        module._parameters, module._buffers = {}, {}
    return Pilot(sparsities, weights)


def _blocks(names: Sequence[str], groups: Groups) -> tuple[str, ...]:
    """Return prefixes of the blocks to prune: a row of those with most groups.

    Of several such rows, it is the one closest to the middle of the model.
    """
    count = max(1, min(_BLOCKS, len(names) // 2))
    rows = [
        tuple(f"{name}." for name in names[first : first + count])
        for first in range(len(names) - count + 1)
    ]

    def rank(position: int) -> tuple[int, float]:
        found = sum(g[0].startswith(rows[position]) for g in groups.values())
        return found, -abs(position - (len(rows) - 1) / 2)

    return rows[max(range(len(rows)), key=rank)]


def _recovers(
    modifier: MaskedRecoveryModifier, model: nn.Module, inside: tuple[str, ...]
) -> bool:
    """Return whether a modifier refines one of some blocks."""
    targets = modifier.targets or [prefix.removesuffix(".") for prefix in inside]
    found = match_named_modules(model, targets, modifier.ignore)
    return any(f"{name}." in inside for name, _ in found)
