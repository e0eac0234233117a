"""Find what a recipe prunes, and write what a plan has chosen into it.

A plan is an ordinary llm-compressor recipe: groups that stay dense are under ``ignore``
of the modifiers that would prune them, and sparsities of other groups are in a mapping
under ``sparsity``.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from compressed_tensors.utils import match_named_modules, match_targets
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from torch import nn

from llmc_attnmask.checkpoint.io.atomic import new_file
from llmc_attnmask.checkpoint.linears import served_groups, single_groups
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.modifiers.alps_pruning import ALPSPruningModifier
from llmc_attnmask.modifiers.attention_pruning import AttentionMatrixPruningModifier
from llmc_attnmask.modifiers.masked_recovery import MaskedRecoveryModifier
from llmc_attnmask.oneshot.patterns import by_pattern, patterns
from llmc_attnmask.oneshot.planned_attention import (
    attention_linears,
    check_attention,
    left_to_alps,
)
from llmc_attnmask.oneshot.recipe import RecipeError, load_recipe, read_recipe
from llmc_attnmask.oneshot.sensitivity import Groups
from llmc_attnmask.oneshot.trade_off import Sparsities
from llmc_attnmask.recovery.blockwise import block_names
from llmc_attnmask.runlog.wording import listed

_PRUNERS = (
    ALPSPruningModifier,
    AttentionMatrixPruningModifier,
    SparsityModifierBase,
)
ARGS = "args"  # of a recipe, beside its stages; llm-compressor leaves them alone
# the group of a modifier that prunes what is left to ALPS; before all others, because
# recovery comes after pruning
_INSTEAD = "instead_{}_modifiers"
PLAN = "llmc_attnmask_plan"  # what the plan was, in there
_SUMMARY = {  # what it says
    *("model", "budget", "size", "dense_share", "sparsity", "expected_rise", "curve"),
}


def plan_of(recipe: Path) -> dict[str, Any] | None:
    """Return what a recipe says about the plan that it was made by, if it was."""
    found = (read_recipe(recipe).get(ARGS) or {}).get(PLAN)
    return found if isinstance(found, dict) else None


def check_plan(recipe: Path, model: nn.Module) -> None:
    """Refuse a plan that was made for another model, or is incomplete.

    :param model: as it was loaded
    :raises RecipeError: if its weights have other names or shapes
    """
    plan = plan_of(recipe)
    if plan is None:
        return
    if missing := sorted(_SUMMARY - plan.keys()):
        raise RecipeError(
            f"recipe {recipe} has a plan under `{ARGS}` without {', '.join(missing)}; "
            f"run `llmc-attnmask plan`, or remove `{PLAN}`"
        )
    planned, found = plan["model"], model_identity(model)
    if planned != found:
        raise RecipeError(
            f"recipe {recipe} is a plan for another model ({planned}, and this one is "
            f"{found}), so its layers do not mean the same; run `llmc-attnmask plan` "
            "for this one"
        )


def model_identity(model: nn.Module) -> str:
    """Return what identifies a model's weights by name and shape."""
    shapes = sorted((name, tuple(p.shape)) for name, p in model.named_parameters())
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
    return f"{type(model).__name__}, {len(shapes)} tensors, {digest}"


class PlannedRecipe:
    """A recipe as the template of a plan.

    :param path: the YAML file
    :raises RecipeError: if it prunes nothing, or with several mask structures
    """

    def __init__(self, path: Path):
        self.path = path
        self.modifiers = load_recipe(path).modifiers
        self.pruners: list[Any] = [m for m in self.modifiers if isinstance(m, _PRUNERS)]
        self.pruning: list[Any] = [
            m
            for m in self.modifiers
            if isinstance(m, (*_PRUNERS, MaskedRecoveryModifier))
        ]
        """What prunes or refines what is left, without what quantizes."""
        self.recovers = any(
            isinstance(m, MaskedRecoveryModifier) for m in self.modifiers
        )
        structures = sorted({str(m.mask_structure) for m in self.pruners})
        if not structures:
            raise RecipeError(
                f"recipe {path} does not prune; expected ALPSPruningModifier, "
                "AttentionMatrixPruningModifier, SparseGPTModifier or "
                "WandaPruningModifier"
            )
        if len(structures) > 1:
            raise RecipeError(
                f"recipe {path} prunes with the mask structures "
                f"{' and '.join(structures)}; a plan has one"
            )
        self.structure = MaskStructure.parse(structures[0])
        if self.structure.unstructured:
            self._check_sparsities()

    def _check_sparsities(self) -> None:
        for modifier in self.pruners:
            if isinstance(modifier, SparsityModifierBase):
                raise RecipeError(
                    f"{type(modifier).__name__} has one sparsity for all groups of a "
                    "block, so unstructured sparsity cannot be planned with it; use "
                    "ALPSPruningModifier, whose sparsity may be a mapping"
                )

    def groups(self, model: nn.Module) -> dict[str, list[str]]:
        """Return what is sparse or dense as a whole: group -> Linears.

        For N:M these are the matrices of servers. Nothing asks for the same
        unstructured sparsity in all of a matrix, and v costs several times as much per
        weight as q. So there every Linear is a group, except for those of an attention
        module that one modifier prunes alike.

        :raises RecipeError: if it prunes nothing of the model
        :raises ValueError: if the mask structure does not fit a Linear
        """
        pruned = dict.fromkeys(
            name for m in self.pruners for name in _pruned_linears(m, model)
        )
        if not pruned:
            raise RecipeError(
                f"recipe {self.path} prunes no Linear of {type(model).__name__}"
            )
        blocks = tuple(f"{name}." for name in block_names(model))
        if outside := [name for name in pruned if not name.startswith(blocks)]:
            raise RecipeError(
                f"recipe {self.path} prunes {listed(outside)}, outside the decoder "
                f"blocks ({blocks[0]} and so on), where losses are not measured; put "
                "them under `ignore`"
            )
        for name in pruned:
            if not isinstance(model.get_submodule(name), nn.Linear):
                raise RecipeError(
                    f"{name} is a {type(model.get_submodule(name)).__name__}; a plan "
                    "treats Linear layers only"
                )
            try:
                self.structure.groups(model.get_parameter(f"{name}.weight"))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        attention = [
            (modifier, self._left_to_alps(model, modifier))
            for modifier in self.pruners
            if isinstance(modifier, AttentionMatrixPruningModifier)
        ]
        if self.structure.unstructured:
            alike = [
                names
                for modifier, left in attention
                for module, names in attention_linears(modifier, model).items()
                if module not in left
            ]
            groups = single_groups(pruned, alike)
        else:
            groups = served_groups(pruned)
        for modifier, left in attention:
            check_attention(modifier, model, groups, left)
        return groups

    def _left_to_alps(self, model: nn.Module, modifier: Any) -> dict[str, list[str]]:
        """Return what a modifier cannot prune as a plan needs it.

        :return: attention module -> Linears that ALPS prunes instead
        """
        if not isinstance(modifier, AttentionMatrixPruningModifier):
            return {}
        others = {
            name
            for each in self.pruners
            if each is not modifier
            for name in _pruned_linears(each, model)
        }
        return left_to_alps(modifier, model, others)

    def write(
        self,
        output: Path,
        model: nn.Module,
        groups: Groups,
        sparsities: Sparsities,
        summary: Mapping[str, Any],
    ) -> None:
        """Write the recipe with the sparsities of a plan.

        :param summary: of the plan, YAML values, which goes into the recipe's ``args``
        """
        content = read_recipe(self.path)
        args = content.pop(ARGS, None) or {}
        kinds = {type(m).__name__ for m in self.pruners}
        waiting = iter(self.pruners)
        sparsity_of = {
            name: sparsities[group] for group, names in groups.items() for name in names
        }
        for stage, inside in content.items():
            instead: dict[str, Any] = {}
            free = (n for i in count() if (n := _INSTEAD.format(i)) not in inside)
            for modifiers in inside.values():
                for name in [name for name in modifiers if name in kinds]:
                    modifier = next(waiting)
                    left = self._left_to_alps(model, modifier)
                    fields = _fields(modifier, model, sparsity_of, left)
                    if fields is None:
                        del modifiers[name]
                    else:
                        modifiers[name].update(fields)
                    if alps := self._alps(left, sparsity_of):
                        instead[next(free)] = alps
            content[stage] = instead | inside
        content = _without_empty(content) | {ARGS: {**args, PLAN: dict(summary)}}
        with new_file(output) as partial:
            partial.write_text(
                yaml.safe_dump(content, sort_keys=False, width=88), encoding="utf-8"
            )

    def _alps(
        self, left: Mapping[str, Sequence[str]], sparsity_of: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return the modifier that prunes what is left to ALPS; none if nothing is."""
        found = {name: sparsity_of[name] for each in left.values() for name in each}
        pruned = {name: sparsity for name, sparsity in found.items() if sparsity}
        if not pruned:
            return {}
        sparsities = by_pattern(pruned)
        structure = self.structure
        return {
            "ALPSPruningModifier": {
                "sparsity": sparsities
                if structure.unstructured
                else structure.pruned / structure.group,
                "mask_structure": str(structure),
                "targets": [*sparsities],
            }
        }


def _without_empty(content: dict[str, Any]) -> dict[str, Any]:
    """Drop groups and stages of a recipe that name no modifier."""
    stages = {
        stage: {group: modifiers for group, modifiers in inside.items() if modifiers}
        for stage, inside in content.items()
    }
    return {stage: inside for stage, inside in stages.items() if inside}


def _pruned_linears(modifier: Any, model: nn.Module) -> list[str]:
    """Return the names of the Linears that a modifier would prune, in model order."""
    if isinstance(modifier, AttentionMatrixPruningModifier):
        return [
            name
            for each in attention_linears(modifier, model).values()
            for name in each
        ]
    targets = match_named_modules(model, modifier.targets)
    if isinstance(modifier, ALPSPruningModifier):
        return [
            name
            for name, linear in targets
            if isinstance(linear, nn.Linear)
            and not match_targets(name, linear, modifier.ignore)
        ]
    # stock modifiers prune what is inside their targets, and match `ignore` with names
    # that end in a dot if the target is the Linear itself
    return list(
        dict.fromkeys(
            f"{name}.{child}".rstrip(".")
            for name, target in targets
            for child, linear in target.named_modules()
            if isinstance(linear, nn.Linear)
            and not match_targets(f"{name}.{child}", linear, modifier.ignore)
        )
    )


def _fields(
    modifier: Any,
    model: nn.Module,
    sparsity_of: Mapping[str, float],
    left: Mapping[str, Sequence[str]],
) -> dict[str, Any] | None:
    """Return the fields of a pruning modifier that say what was chosen.

    :param left: attention modules that it does not prune, whatever was chosen
    :return: None if it has nothing left to prune
    """
    by_layer = isinstance(modifier, AttentionMatrixPruningModifier)
    if by_layer:
        found = {
            attention: 0.0 if attention in left else sparsity_of[names[0]]
            for attention, names in attention_linears(modifier, model).items()
        }
    else:
        found = {name: sparsity_of[name] for name in _pruned_linears(modifier, model)}
    pruned = {name: sparsity for name, sparsity in found.items() if sparsity}
    if not pruned:
        return None
    fields: dict[str, Any] = {}
    if dense := [name for name in found if name not in pruned]:
        fields["ignore"] = [*modifier.ignore, *patterns(dense)]
    unstructured = MaskStructure.parse(modifier.mask_structure).unstructured
    if by_layer and (unstructured or isinstance(modifier.sparsity, list)):
        fields["sparsity"] = list(pruned.values())
    elif unstructured:
        fields["sparsity"] = by_pattern(pruned)
    return fields
