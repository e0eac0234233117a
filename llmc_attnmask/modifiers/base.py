"""The common base of this package's modifiers: the field ``storage``, and the run."""

from collections.abc import Iterable
from typing import Any

from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr

from llmc_attnmask.calibration.memory import reuse_freed_memory
from llmc_attnmask.checkpoint.config import Storage
from llmc_attnmask.distributed import is_source
from llmc_attnmask.runlog.context import described, end_run, run_of
from llmc_attnmask.runlog.journal import run_metadata
from llmc_attnmask.runlog.layer_log import summarize
from llmc_attnmask.upstream.save import save_as


class StoredModifier(Modifier):
    """
    Base of the modifiers that choose how the model's 2:4 layers are written when it is
    saved, by ``oneshot(output_dir=...)`` or ``save_pretrained``.

    :param storage: "dense", with zeros in place and a marker, or "sparse-24-bitmask".
        Defaults to the storage that another modifier of the recipe names, or else to
        "dense"
    """

    storage: Storage | None = None

    _done: dict[str, int] = PrivateAttr(default_factory=dict)

    @property
    def done(self) -> dict[str, int]:
        """Finished layer -> how many of its modules have changed."""
        return self._done

    def initialize(self, state: State, **kwargs: Any) -> None:
        reuse_freed_memory()
        recipe = active_session().lifecycle.recipe
        modifiers = recipe.modifiers if recipe else []
        storage = recipe_storage([self, *modifiers])
        run = run_of(self, modifiers)
        super().initialize(state, **kwargs)
        run_metadata(state.model).update(
            modifiers=described(run.modifiers), warnings=run.warnings
        )
        save_as(state.model, storage)

    def finalize(self, state: State, **kwargs: Any) -> None:
        super().finalize(state, **kwargs)
        ours = [m for m in run_of(self).modifiers if isinstance(m, StoredModifier)]
        if self is ours[-1]:
            if is_source():
                summarize(state.model)
            end_run()


def recipe_storage(modifiers: Iterable[Modifier]) -> Storage:
    """Return the storage that the modifiers of a recipe agree on.

    :raises ValueError: if they name more than one
    """
    asked = [m.storage for m in modifiers if isinstance(m, StoredModifier)]
    named = sorted({storage for storage in asked if storage})
    if len(named) > 1:
        raise ValueError(
            f"modifiers of the recipe ask for the storages {' and '.join(named)}; a "
            "checkpoint has one storage, so name it in one modifier"
        )
    return named[0] if named else "dense"
