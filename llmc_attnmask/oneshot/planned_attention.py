"""What ``AttentionMatrixPruningModifier`` prunes, and what a plan leaves to ALPS."""

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from llmc_attnmask.attention.capture import UnsupportedAttentionError
from llmc_attnmask.attention.projections import find_projections
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.modifiers.attention_pruning import AttentionMatrixPruningModifier
from llmc_attnmask.modifiers.attention_targets import select_attention
from llmc_attnmask.oneshot.recipe import RecipeError
from llmc_attnmask.oneshot.sensitivity import Groups


def attention_linears(
    modifier: AttentionMatrixPruningModifier, model: nn.Module
) -> dict[str, list[str]]:
    """Return the Linears that a modifier prunes, of each attention module.

    Of a module whose attention matrix cannot be computed, they are those with the usual
    names.

    :raises UnsupportedAttentionError: if there are no such Linears
    """
    selected = select_attention(model, modifier.targets, modifier.ignore)
    return {
        name: [f"{name}.{child}" for child in _children(modifier, attention)]
        for name, attention in selected.items()
    }


def _children(
    modifier: AttentionMatrixPruningModifier, attention: nn.Module
) -> list[str]:
    try:
        found = find_projections(attention)
    except UnsupportedAttentionError:
        usual = [f"{role}_proj" for role in modifier.projections]
        if not all(hasattr(attention, child) for child in usual):
            raise  # nothing says which Linears are q and k
        return usual
    children = [p.child for role, p in found.items() if role in modifier.projections]
    return list(dict.fromkeys(children))


def left_to_alps(
    modifier: AttentionMatrixPruningModifier,
    model: nn.Module,
    others: Collection[str],
) -> dict[str, list[str]]:
    """Return what a modifier cannot prune as a plan needs it.

    These are attention modules whose matrix cannot be computed, and those with rows in
    a Linear that has others: servers keep a Linear sparse or dense as a whole.

    :param others: Linears that other modifiers prune
    :return: attention module -> Linears that ALPS prunes instead, without ``others``
    """
    # a second modifier keeps the entries that a first one has pruned only if the groups
    # of N:M leave it no choice
    keeps = not MaskStructure.parse(modifier.mask_structure).unstructured
    found = {}
    for name, linears in attention_linears(modifier, model).items():
        instead = [linear for linear in linears if linear not in others]
        try:
            projections = find_projections(model.get_submodule(name))
        except UnsupportedAttentionError:
            found[name] = instead
            continue
        pruned = [projections[r] for r in modifier.projections if r in projections]
        in_part = {f"{name}.{p.child}" for p in pruned if not p.whole}
        if in_part and not (keeps and in_part <= set(others)):
            found[name] = instead
    return found


def check_attention(
    modifier: AttentionMatrixPruningModifier,
    model: nn.Module,
    groups: Groups,
    left: Mapping[str, Sequence[str]],
) -> None:
    """Refuse projections of different groups, which one sparsity cannot tell apart.

    :param left: attention modules that it does not prune
    """
    group_of = {name: group for group, names in groups.items() for name in names}
    for attention, names in attention_linears(modifier, model).items():
        found = {group_of[name] for name in names}
        if attention not in left and len(found) > 1:
            raise RecipeError(
                f"AttentionMatrixPruningModifier prunes {modifier.projections} of "
                f"{attention} alike, but servers keep them in {len(found)} matrices, "
                "which a plan treats one by one; let it prune what is in one of them, "
                "q and k of most models, and ALPSPruningModifier the others"
            )
