"""The methods of a comparison: baselines, and the recipes they are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmc_attnmask.attention.projections import (
    Role,
    attention_modules,
    find_projections,
)
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.planned_recipe import PlannedRecipe, check_plan, plan_of
from llmc_attnmask.oneshot.recipe import load_recipe

Scope = Literal["nothing", "q and k", "whole block"]
_ROLES: tuple[Role, ...] = ("q", "k")
BASELINES: dict[str, type | None] = {
    "magnitude": None,  # needs no calibration
    "Wanda": WandaPruningModifier,
    "SparseGPT": SparseGPTModifier,
}


@dataclass(frozen=True)
class Method:
    """One row of a comparison."""

    name: str
    scope: Scope
    structure: str = ""
    sparsity: float = 0.0
    recipe: Path | None = None  # of ours; None for baselines and the dense model
    plan: Path | None = None  # a planned recipe: what it leaves dense stays dense

    @property
    def calibrated(self) -> bool:
        return self.name not in ("dense", "magnitude")

    @property
    def pruned(self) -> str:
        """What is pruned, in words."""
        if self.plan is None:
            return self.scope
        share = (plan_of(self.plan) or {})["dense_share"]
        return f"{self.scope} but {share:.0%}"

    def modifiers(self, model: PreTrainedModel) -> list[Any]:
        """Return what ``oneshot`` runs; nothing for the dense model and magnitude.

        :raises RecipeError: for a plan of another model
        """
        if self.plan is not None:
            check_plan(self.plan, model)
        if self.recipe is not None:
            return load_recipe(self.recipe).modifiers
        baseline = BASELINES.get(self.name)
        if baseline is None:
            return []
        if self.plan is None:
            names = linear_names(model, self.scope)
        else:
            linearize_moe(model)  # as a recipe's own run does
            groups = PlannedRecipe(self.plan).groups(model).values()
            names = [name for members in groups for name in members]
        return [
            baseline(
                sparsity=self.sparsity, mask_structure=self.structure, targets=names
            )
        ]


def methods(
    scope: Scope, recipes: Sequence[Path], baselines: Sequence[str]
) -> list[Method]:
    """Return baselines and recipes that prune the same Linears.

    Before each planned recipe, SparseGPT prunes what that recipe prunes.

    :param recipes: the baselines take sparsity and mask structure of the first
    :param baselines: names of ``BASELINES``
    :raises ValueError: if the first recipe has more than one sparsity
    """
    if not recipes:
        return []
    structure, sparsity = _pruning(recipes[0])
    found = [Method(name, scope, structure, sparsity) for name in baselines]
    for path in recipes:
        plan = path if plan_of(path) else None
        if plan:
            own = _pruning(path)
            found.append(Method("SparseGPT", scope, *own, plan=plan))
        name = f"ours, {path.stem.removeprefix('attention_')}"
        found.append(Method(name, scope, recipe=path, plan=plan))
    return found


def _pruning(recipe: Path) -> tuple[str, float]:
    """Return the mask structure and the sparsity that a recipe has everywhere."""
    found = {
        (str(m.mask_structure), str(m.sparsity)): m.sparsity
        for m in load_recipe(recipe).modifiers
        if hasattr(m, "mask_structure") and hasattr(m, "sparsity")
    }
    if len(found) != 1 or not isinstance(next(iter(found.values())), float):
        given = "; ".join(" at ".join(pair) for pair in found) or "nothing"
        raise ValueError(
            f"recipe {recipe} prunes {given}; expected one sparsity and one mask "
            "structure for all layers, to compare baselines with"
        )
    ((structure, _), sparsity) = next(iter(found.items()))
    return structure, sparsity


@torch.no_grad()
def prune_by_magnitude(model: PreTrainedModel, method: Method) -> None:
    """Zero the smallest weights of every projection or Linear that is in scope."""
    structure = MaskStructure.parse(method.structure)
    for weight in weights(model, method.scope):
        kept = structure.mask(weight.abs(), method.sparsity)
        weight.masked_fill_(~kept, 0.0)


def linear_names(model: PreTrainedModel, scope: Scope) -> list[str]:
    """Return the names of the Linears that are in scope, in model order.

    :raises ValueError: if q or k shares a Linear with other projections, and only q and
        k are in scope
    """
    return q_and_k_names(model) if scope == "q and k" else list(_block(model))


def q_and_k_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the Linears that are q or k.

    They are for modifiers that prune whole Linears.

    :raises ValueError: if q or k shares a Linear with other projections
    """
    targets = []
    for name, attention in attention_modules(model).items():
        projections = find_projections(attention)
        if not all(projections[role].whole for role in _ROLES):
            raise ValueError(
                f"{name} has q or k in one Linear with other projections, and the "
                "baselines cannot prune a part of a Linear; choose a model with "
                "separate projections"
            )
        targets += [f"{name}.{projections[role].child}" for role in _ROLES]
    return targets


def _block(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return every Linear by name, except the one that computes the logits."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def weights(model: PreTrainedModel, scope: Scope) -> list[Tensor]:
    """Return views [rows, columns] of weights that are in scope.

    If nothing is, for the dense model, they are those of the whole block.
    """
    if scope != "q and k":
        return [linear.weight.detach() for linear in _block(model).values()]
    found = []
    for attention in attention_modules(model).values():
        projections = find_projections(attention)
        for role in _ROLES:
            parameter = attention.get_parameter(projections[role].parameter)
            found.append(projections[role].of(parameter.detach()))
    return found
