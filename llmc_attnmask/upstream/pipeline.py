"""Skip the calibration of passes that an earlier run finished.

llm-compressor runs every modifier of a recipe through its own pipeline. A pass that is
complete on disk is read from there, layer by layer, and its pipeline is skipped.
This package's modifiers save layer by layer themselves (``runlog/layer_work.py``);
stock pruning and GPTQ modifiers are saved when their pass is complete; any others run
again, as they did the first time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmcompressor.core import LifecycleCallbacks, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from loguru import logger
from torch import nn

from llmc_attnmask.runlog.context import recorded_run, run_of
from llmc_attnmask.runlog.layer_work import Resumable
from llmc_attnmask.runlog.progress import Progress


@contextmanager
def resumable(progress: Progress) -> Iterator[None]:
    """Record the run within the block, and skip what is already on disk."""
    original = SequentialPipeline.__dict__["__call__"]

    def call(model: nn.Module, dataloader: Any, dataset_args: Any) -> None:
        # the independent pipeline leaves one modifier at a time in the recipe
        (modifier,) = active_session().lifecycle.recipe.modifiers
        layers = progress.finished_pass(modifier)
        if layers is None:
            original.__func__(model, dataloader, dataset_args)
            _finish(progress, model, modifier)
        else:
            _restore(progress, model, modifier, layers)

    SequentialPipeline.__call__ = staticmethod(call)  # type: ignore[method-assign]
    try:
        with recorded_run(progress):
            yield
    finally:
        SequentialPipeline.__call__ = original  # type: ignore[method-assign]


def _restore(
    progress: Progress, model: nn.Module, modifier: Modifier, layers: list[str]
) -> None:
    logger.info(f"{type(modifier).__name__} was already finished; reading it from disk")
    LifecycleCallbacks.calibration_start()
    for layer in layers:
        changed = progress.restore(model, modifier, layer)
        if isinstance(modifier, Resumable):
            modifier.done[layer] = len(changed)
            run_of(modifier).layer_restored(modifier)
    LifecycleCallbacks.calibration_end()


def _finish(progress: Progress, model: nn.Module, modifier: Modifier) -> None:
    """Record that the pass of a modifier is complete, if it can be resumed."""
    if isinstance(modifier, SparsityModifierBase | GPTQModifier):
        # activation scales are known only at the end, so this package's layers are
        # written again, too
        layers = [progress.name_of(model, m) for m in modifier._module_names]
        for module, name in zip(modifier._module_names, layers, strict=True):
            progress.save(model, modifier, name, [module], [])
    elif isinstance(modifier, Resumable):
        layers = list(modifier.done)
    else:
        return
    progress.finish_pass(modifier, layers)
