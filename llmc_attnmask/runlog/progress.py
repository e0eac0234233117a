"""Progress of a run on disk: what was cut off goes on at its first unfinished layer.

A run is one pass per modifier, a pass is one *step* per layer. What a step has changed,
the tensors of some modules, their masks and the journal's entries, is one safetensors
file, which is there complete or not at all. When the same run starts again, steps that
have a file are read instead of computed. What a layer is calibrated on comes through
the layers before it, which have the same bytes, and so has the result. A pass that has
been finished is not calibrated again at all.

Our modifiers take part step by step. Stock pruning and GPTQ modifiers are taken up pass
by pass; others run again, as they did the first time.
"""

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast, runtime_checkable

import torch
from llmcompressor.core import LifecycleCallbacks, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from loguru import logger
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmc_attnmask.checkpoint.io.atomic import check_new, new_file
from llmc_attnmask.checkpoint.io.writer import disk_errors
from llmc_attnmask.distributed import is_source, write_parameter
from llmc_attnmask.masks.record import clear_mask, get_mask, packed, set_mask, unpacked
from llmc_attnmask.runlog import journal
from llmc_attnmask.runlog.run import run_of

_RUN, _LOCK, _STEP, _PASS = "run.json", "lock", ".safetensors", ".json"
_MASK = "mask"  # beside a module's own tensors in a step's file

Fingerprint = Mapping[str, str]


class ProgressError(ValueError):
    """The progress on disk is of another run; the message says what differs."""


@dataclass
class LayerWork:
    """One layer's share of a pass."""

    restored: bool = False  # read from disk: there is nothing to do
    changed: list[nn.Module] = field(default_factory=list)


class Progress:
    """What a run has finished so far, in a folder that it creates with the first step.

    :param folder: where the files go
    :param fingerprint: what the result depends on, name -> value
    :param modifiers: of the recipe, in order
    :raises ProgressError: if the folder holds the progress of another run, or another
        process is at work in it
    """

    def __init__(
        self, folder: Path, fingerprint: Fingerprint, modifiers: Sequence[Modifier]
    ):
        self.folder, self.fingerprint = folder, dict(fingerprint)
        self.modifiers = list(modifiers)
        self._lock: IO | None = None
        self._names: dict[nn.Module, str] = {}
        self._finished: set[str] = set()
        self._passes: set[str] = set()
        if (folder / _RUN).exists():
            self._open()

    @property
    def steps(self) -> int:
        """Steps on disk."""
        return len(self._finished)

    def _open(self) -> None:
        self._take()
        path = self.folder / _RUN
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ProgressError(
                f"{path} is no JSON ({error}); remove {self.folder}"
            ) from None
        differing = [
            f"{name} (was {found.get(name)!r}, is {value!r})"
            for name, value in self.fingerprint.items()
            if found.get(name) != value
        ]
        if differing:
            raise ProgressError(
                f"{self.folder} holds the progress of another run, which differs in "
                f"{', '.join(differing)}; give the same command to resume it, or "
                "remove the folder to start anew"
            )
        self._finished = {p.name for p in self.folder.glob(f"[0-9]*{_STEP}")}
        self._passes = {p.name for p in self.folder.glob(f"[0-9]*{_PASS}")}

    def _take(self) -> None:
        """Lock the folder; the lock goes with the process, however it ends."""
        if not is_source():
            return
        self._lock = (self.folder / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ProgressError(
                f"another process is at work in {self.folder.parent}; wait for it or "
                "name another output"
            ) from None
        except OSError as error:  # network file systems may have no locks
            logger.warning(
                f"{self.folder} cannot be locked ({error.strerror}); see to it that no "
                "other process works there"
            )

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.close()

    def has(self, modifier: Modifier, layer: str) -> bool:
        """Whether a step was on disk when the run started, or is now."""
        return self._file(modifier, layer) in self._finished

    def _file(self, modifier: Modifier, layer: str) -> str:
        return f"{self._stem(modifier)} {layer}{_STEP}"

    def _stem(self, modifier: Modifier) -> str:
        position = next(i for i, m in enumerate(self.modifiers) if m is modifier)
        return f"{position:02d} {type(modifier).__name__}"

    @torch.no_grad()
    def save(
        self,
        model: nn.Module,
        modifier: Modifier,
        layer: str,
        changed: Iterable[nn.Module],
        entries: Sequence[journal.Entry],
    ) -> None:
        """Write a step; in a distributed run one process does."""
        file = self._file(modifier, layer)
        self._finished.add(file)
        if not is_source():
            return
        tensors: dict[str, Tensor] = {}
        for module in changed:
            name = self._name(model, module)
            for key, value in _own_tensors(module).items():
                # a clone: safetensors refuses tensors that share memory
                tensors[f"{name}:{key}"] = value.detach().cpu().clone().contiguous()
            if (kept := get_mask(module)) is not None:
                tensors[f"{name}:{_MASK}"] = torch.from_numpy(packed(kept))
        if self._lock is None:
            self._create()
        metadata = {"journal": json.dumps([asdict(entry) for entry in entries])}
        with new_file(self.folder / file) as partial, disk_errors(partial):
            save_file(tensors, partial, metadata)

    def _create(self) -> None:
        if not self.folder.exists():
            check_new(self.folder.parent)  # another run may have finished meanwhile
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take()
        for left in self.folder.glob("[0-9]*"):  # of no run that is known
            left.unlink()
        self._write(_RUN, self.fingerprint)

    @torch.no_grad()
    def restore(
        self, model: nn.Module, modifier: Modifier, layer: str
    ) -> list[nn.Module]:
        """Give the modules that a step has changed what it has written.

        :return: these modules
        """
        modules: dict[str, nn.Module] = {}
        path = self.folder / self._file(modifier, layer)
        with safe_open(path, "pt") as file:
            entries = json.loads(file.metadata()["journal"])
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                name, _, tensor = key.rpartition(":")
                modules.setdefault(name, model.get_submodule(name))
                if tensor != _MASK:
                    write_parameter(modules[name], tensor, file.get_tensor(key))
            for name, module in modules.items():
                clear_mask(module)
                if f"{name}:{_MASK}" in file.keys():  # noqa: SIM118
                    shape = cast(Tensor, module.weight).shape
                    bits = file.get_tensor(f"{name}:{_MASK}").numpy()
                    set_mask(module, unpacked(bits, shape))
        journal.entries(model).extend(journal.Entry(**entry) for entry in entries)
        return list(modules.values())

    def _name(self, model: nn.Module, module: nn.Module) -> str:
        if module not in self._names:
            self._names = {m: name for name, m in model.named_modules()}
        return self._names[module]

    def finish(self, model: nn.Module, modifier: Modifier) -> None:
        """Note that the pass of a modifier is complete, if it can be taken up."""
        if isinstance(modifier, SparsityModifierBase | GPTQModifier):
            # activation scales are known at the end only, so ours write again, too
            layers = [self._name(model, module) for module in modifier._module_names]
            for module, name in zip(modifier._module_names, layers, strict=True):
                self.save(model, modifier, name, [module], [])
        elif isinstance(modifier, Resumable):
            layers = list(modifier.done)
        else:
            return
        if is_source() and self._lock is not None:
            self._write(f"{self._stem(modifier)}{_PASS}", layers)

    def _write(self, name: str, content: object) -> None:
        with new_file(self.folder / name) as partial:
            partial.write_text(json.dumps(content, indent=2), encoding="utf-8")

    def finished(self, modifier: Modifier) -> list[str] | None:
        """The steps of a pass that was complete when the run started, or None."""
        name = f"{self._stem(modifier)}{_PASS}"
        if name not in self._passes:
            return None
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


@runtime_checkable
class Resumable(Protocol):
    """A modifier whose work is within ``layer_work``, layer by layer."""

    @property
    def done(self) -> dict[str, int]:
        """Layer -> how many of its modules have changed."""


_active: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextmanager
def recorded(progress: Progress) -> Iterator[None]:
    """Record the run within, and take up what is on disk already."""
    token = _active.set(progress)
    original = SequentialPipeline.__dict__["__call__"]

    def call(model: nn.Module, dataloader: Any, dataset_args: Any) -> None:
        # the independent pipeline leaves one modifier at a time in the recipe
        (modifier,) = active_session().lifecycle.recipe.modifiers
        layers = progress.finished(modifier)
        if layers is None:
            original.__func__(model, dataloader, dataset_args)
            progress.finish(model, modifier)
            return
        logger.info(f"{type(modifier).__name__}: finished before, read from disk")
        LifecycleCallbacks.calibration_start()
        for layer in layers:
            changed = progress.restore(model, modifier, layer)
            if isinstance(modifier, Resumable):
                modifier.done[layer] = len(changed)
                run_of(modifier).layer_restored(modifier)
        LifecycleCallbacks.calibration_end()

    SequentialPipeline.__call__ = staticmethod(call)  # type: ignore[method-assign]
    try:
        yield
    finally:
        SequentialPipeline.__call__ = original  # type: ignore[method-assign]
        _active.reset(token)


def restorable(modifier: Modifier, layer: str) -> bool:
    """Whether ``layer_work`` will read this layer instead of having it computed."""
    progress = _active.get()
    return progress is not None and progress.has(modifier, layer)


@contextmanager
def layer_work(
    model: nn.Module, modifier: Resumable, layer: str
) -> Iterator[LayerWork]:
    """One layer's share of a modifier's pass; without a recorded run, only counted.

    Within, do the work unless it is ``restored``, and name the modules ``changed``.
    """
    progress = _active.get()
    current = LayerWork()
    if progress is not None and progress.has(cast(Modifier, modifier), layer):
        current.restored = True
        current.changed = progress.restore(model, cast(Modifier, modifier), layer)
        run_of(cast(Modifier, modifier)).layer_restored(cast(Modifier, modifier))
        logger.info(f"{type(modifier).__name__}: {layer} finished before, read")
    before = len(journal.entries(model))
    yield current
    if progress is not None and not current.restored:
        new = journal.entries(model)[before:]
        progress.save(model, cast(Modifier, modifier), layer, current.changed, new)
    modifier.done[layer] = len(current.changed)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, not those of its children."""
    named = [
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ]
    return dict(named)
