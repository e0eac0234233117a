"""Guard the masks: no modifier of a run may fill in what an earlier one pruned.

llm-compressor has no notion of masks: a modifier after the pruning one may write
anything, and since 0.13 its GPTQ does. Modifiers change a model only within
``Modifier.initialize``, ``update_event`` and ``finalize``, so these three are wrapped.
Masks are recorded after every modifier that prunes, stock ones included, and checked
after every modifier, so an error can name the one that broke a mask. A modifier that is
known to break masks is refused before anything is calibrated.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast, runtime_checkable

import torch
from compressed_tensors.utils import (
    getattr_chain,
    match_named_modules,
    match_targets,
)
from llmcompressor.core import Event, EventType, State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import (
    PRUNABLE_LAYER_TYPES,
    SparsityModifierBase,
)
from torch import Tensor, nn

from llmc_attnmask.distributed import world_size
from llmc_attnmask.masks.detection import detect_mask
from llmc_attnmask.masks.record import clear_mask, count_violations, get_mask, set_mask
from llmc_attnmask.runlog.wording import listed

_WRITING_EVENTS = {
    EventType.CALIBRATION_START,  # rotations are applied here
    EventType.SEQUENTIAL_EPOCH_END,
    EventType.CALIBRATION_END,
}


class MaskBrokenError(ValueError):
    """A modifier has overwritten, or would overwrite, what an earlier one pruned."""


@runtime_checkable
class Pruner(Protocol):
    """A pruning modifier of this package; it records its masks with ``set_mask``."""

    def linears_to_prune(self) -> Iterable[nn.Module]:
        """Return the modules to prune, which are known once it is initialized."""


def install() -> None:
    """Wrap the life cycle of every modifier; further calls have no effect."""
    _wrap("initialize", _initialize)
    _wrap("update_event", _update_event)
    _wrap("finalize", _finalize)


def _wrap(method: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(Modifier, method)
    if hasattr(original, "guarded"):
        return

    @functools.wraps(original)
    def guarded(self: Modifier, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    guarded.guarded = True  # type: ignore[attr-defined]
    setattr(Modifier, method, guarded)


def _initialize(
    original: Callable[..., Any], modifier: Modifier, state: State, **kwargs: Any
) -> Any:
    earlier = modifiers_before(modifier)
    if not earlier:
        _find_masks(state.model)
    result = original(modifier, state=state, **kwargs)
    _refuse_racer(modifier)
    _refuse_breaker(modifier, state.model, earlier)
    _check(modifier, state.model)
    return result


def _update_event(
    original: Callable[..., Any],
    modifier: Modifier,
    state: State,
    event: Event,
    **kwargs: Any,
) -> Any:
    result = original(modifier, state=state, event=event, **kwargs)
    if event.type_ in _WRITING_EVENTS:
        _check(modifier, state.model, kwargs.get("modules"))
    if event.type_ == EventType.SEQUENTIAL_EPOCH_END:
        _note(modifier, kwargs.get("modules") or list(state.model.modules()))
    return result


def _finalize(
    original: Callable[..., Any], modifier: Modifier, state: State, **kwargs: Any
) -> Any:
    result = original(modifier, state=state, **kwargs)
    _check(modifier, state.model)
    return result


def _recipe() -> list[Modifier]:
    return active_session().lifecycle.recipe.modifiers or []


def modifiers_before(modifier: Modifier) -> list[Modifier]:
    """Return the modifiers before this one in the recipe that is running."""
    recipe = _recipe()
    position = next((i for i, m in enumerate(recipe) if m is modifier), 0)
    return recipe[:position]


@torch.no_grad()
def _find_masks(model: nn.Module) -> None:
    """Record the masks that the model comes with, and drop those that do not match it.

    Quantized weights have none: a zero among their integers need not mean zero.
    """
    for module in model.modules():
        weight = cast(Tensor | None, getattr(module, "weight", None))
        if weight is None or weight.element_size() == 1:
            clear_mask(module)
            continue
        kept = get_mask(module)
        if kept is not None and (
            weight.shape != kept.shape or count_violations(module)
        ):
            clear_mask(module)  # other weights have been loaded since
            kept = None
        if kept is None and isinstance(module, nn.Linear):
            kept = detect_mask(weight)
            if kept is not None:
                set_mask(module, kept)


def _refuse_racer(modifier: Modifier) -> None:
    """Refuse stock pruning modifiers if several processes would write their results."""
    if isinstance(modifier, SparsityModifierBase) and world_size() > 1:
        raise ValueError(
            f"{type(modifier).__name__} cannot run in {world_size()} processes: it "
            "sees the samples of one rank only, and all ranks write to the same "
            "weights; use ALPSPruningModifier, which also has the fields sparsity, "
            "mask_structure, targets and ignore, or run it in one process"
        )


def _refuse_breaker(
    modifier: Modifier, model: nn.Module, earlier: list[Modifier]
) -> None:
    """Refuse GPTQ, which would overwrite pruned entries, before it calibrates."""
    if not isinstance(modifier, GPTQModifier) or getattr(modifier, "keeps_masks", None):
        return
    pruners: dict[nn.Module, str] = {}
    for module in model.modules():
        if (kept := get_mask(module)) is not None and not kept.all():
            pruners[module] = "an earlier run"
    for pruner in earlier:
        for module in _linears_to_prune(pruner):
            pruners.setdefault(module, type(pruner).__name__)
    broken = [
        module
        for module in modifier._module_names
        if module in pruners and getattr_chain(module, "quantization_scheme.weights", 0)
    ]
    if broken:
        names = [modifier._module_names[module] for module in broken]
        by = listed(sorted({pruners[module] for module in broken}))
        raise MaskBrokenError(
            f"{type(modifier).__name__} would overwrite the pruned entries of "
            f"{len(broken)} layers ({listed(names, most=3)}), pruned by {by}; use "
            "MaskedGPTQModifier, which has the same fields, or QuantizationModifier "
            "(round to nearest): both keep zeros"
        )


def _linears_to_prune(modifier: Modifier) -> Iterable[nn.Module]:
    """Yield the modules that a modifier prunes; none if it is not a pruning modifier.

    Stock MagnitudePruningModifier and ConstantPruningModifier are for training: in a
    oneshot they change nothing.
    """
    if isinstance(modifier, Pruner):
        yield from modifier.linears_to_prune()
    elif isinstance(modifier, SparsityModifierBase) and modifier.sparsity:
        # as its on_calibration_start does, including the unusual names
        for name, layer in modifier._target_layers.items():
            for child, module in match_named_modules(layer, PRUNABLE_LAYER_TYPES):
                if not match_targets(f"{name}.{child}", module, modifier.ignore):
                    yield module


@torch.no_grad()
def _check(
    modifier: Modifier, model: nn.Module, modules: list[nn.Module] | None = None
) -> None:
    """Compare the model, or some of its modules, with the masks.

    :raises MaskBrokenError: if a pruned entry is no longer zero
    """
    for module in model.modules() if modules is None else modules:
        if count := count_violations(module):
            for member in [modifier, *_recipe()]:
                member.remove_hooks()  # the model outlives a run that failed
            raise MaskBrokenError(_broken(modifier, model, module, count))


@torch.no_grad()
def _note(modifier: Modifier, modules: list[nn.Module]) -> None:
    """Record what a stock modifier has just pruned.

    This package's modifiers record their masks themselves.
    """
    if isinstance(modifier, Pruner):
        return
    pruned = set(_linears_to_prune(modifier))
    for module in modules:
        if module in pruned and not (kept := _weight(module) != 0).all():
            set_mask(module, kept)


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _broken(
    modifier: Modifier,
    model: nn.Module,
    module: nn.Module,
    count: int,
) -> str:
    kept = cast(Tensor, get_mask(module))
    name = next(name for name, m in model.named_modules() if m is module)
    if isinstance(modifier, Pruner) or any(True for _ in _linears_to_prune(modifier)):
        advice = "prune each layer once"
        if hasattr(modifier, "preserve_sparsity_mask"):
            advice += ", or set its preserve_sparsity_mask"
    else:
        advice = (
            f"put {type(modifier).__name__} before the pruning, and quantize with "
            "MaskedGPTQModifier or QuantizationModifier, which keep zeros"
        )
    return (
        f"{type(modifier).__name__} has overwritten {count} of the "
        f"{int((~kept).sum())} pruned entries of {name}; {advice}"
    )
