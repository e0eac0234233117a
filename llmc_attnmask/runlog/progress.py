"""The progress of a run on disk, from which an interrupted run is resumed.

A run is one pass per modifier, and a pass works layer by layer. What a modifier changed
in a layer (the tensors of some modules, their masks, the journal's entries) is one
safetensors file, which is either complete or absent. When the same run starts again,
layers that have a file are read instead of computed. The inputs of a layer come from
the layers before it, which have the same bytes, so the result has the same bytes, too.
A pass that was finished is not calibrated again. Calibration data that the run samples
from the model is kept in the same way, one JSON file per part.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from llmcompressor.modifiers import Modifier
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmc_attnmask.checkpoint.io.atomic import check_new, new_file
from llmc_attnmask.checkpoint.io.writer import disk_errors
from llmc_attnmask.distributed import is_source, write_parameter
from llmc_attnmask.masks.record import (
    clear_mask,
    from_bits,
    get_mask,
    set_mask,
    to_bits,
)
from llmc_attnmask.runlog import journal
from llmc_attnmask.runlog.lock import FolderLock

_RUN, _LAYER, _PASS = "run.json", ".safetensors", ".json"
_DATA = "data "  # begins the names of files with calibration data
_MASK = "mask"  # key in a layer's file, next to the module's own tensors

Fingerprint = Mapping[str, str]


class ProgressError(ValueError):
    """The progress on disk belongs to another run; the message says what differs."""


def is_begun(folder: Path) -> bool:
    """Return whether a folder holds the progress of a run."""
    return (folder / _RUN).exists()


class Progress:
    """What a run has finished so far, in a folder that the first layer creates.

    :param folder: where the files go
    :param fingerprint: what the result depends on, name -> value
    :param modifiers: the recipe's, in order
    :raises ProgressError: if the folder holds the progress of another run, or another
        process works in it
    """

    def __init__(
        self, folder: Path, fingerprint: Fingerprint, modifiers: Sequence[Modifier]
    ):
        self.folder, self.fingerprint = folder, dict(fingerprint)
        self.modifiers = list(modifiers)
        self._lock = FolderLock()
        self._names: dict[nn.Module, str] = {}
        self._finished: set[str] = set()
        self._passes: set[str] = set()
        self._data: set[str] = set()
        self._created = self._created_output = False  # by this run
        if is_begun(folder):
            self._open()

    @property
    def layers(self) -> int:
        """The number of layers on disk; a layer counts once for each modifier."""
        return len(self._finished)

    def _open(self) -> None:
        self._take()
        path = self.folder / _RUN
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ProgressError(
                f"{path} is not JSON ({error}); remove {self.folder}"
            ) from None
        differing = [
            f"{name} (was {found.get(name)!r}, is {value!r})"
            for name, value in self.fingerprint.items()
            if found.get(name) != value
        ]
        if differing:
            raise ProgressError(
                f"{self.folder} holds the progress of another run, which differs in "
                f"{', '.join(differing)}; repeat that run's command to resume it, or "
                "remove the folder to start over"
            )
        self._finished = {p.name for p in self.folder.glob(f"[0-9]*{_LAYER}")}
        self._passes = {p.name for p in self.folder.glob(f"[0-9]*{_PASS}")}
        self._data = {p.name for p in self.folder.glob(f"{_DATA}*")}

    def _take(self) -> None:
        if is_source() and not self._lock.take(self.folder):
            raise ProgressError(
                f"another process is working in {self.folder.parent}; wait for it or "
                "name another output"
            )

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()

    def has(self, modifier: Modifier, layer: str) -> bool:
        """Return whether a layer is on disk, from an earlier run or from this one."""
        return self._file(modifier, layer) in self._finished

    def _file(self, modifier: Modifier, layer: str) -> str:
        return f"{self._stem(modifier)} {layer}{_LAYER}"

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
        """Write a layer; in a distributed run, only one process writes.

        :param changed: modules whose tensors and masks are written
        :param entries: the journal's entries about this layer
        """
        file = self._file(modifier, layer)
        self._finished.add(file)
        if not is_source():
            return
        tensors: dict[str, Tensor] = {}
        for module in changed:
            name = self.name_of(model, module)
            for key, value in _own_tensors(module).items():
                # a clone: safetensors refuses tensors that share memory
                tensors[f"{name}:{key}"] = value.detach().cpu().clone().contiguous()
            if (kept := get_mask(module)) is not None:
                tensors[f"{name}:{_MASK}"] = torch.from_numpy(to_bits(kept))
        if not self._lock.held:
            self._create()
        metadata = {"journal": json.dumps([_to_json(entry) for entry in entries])}
        with new_file(self.folder / file) as partial, disk_errors(partial):
            save_file(tensors, partial, metadata)

    def _create(self) -> None:
        if not self.folder.exists():
            check_new(self.folder.parent)  # another run may have just finished
        new_output = not self.folder.parent.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take()
        self._created, self._created_output = True, new_output
        # what lies here without run.json is of an unknown run
        for left in (*self.folder.glob("[0-9]*"), *self.folder.glob(f"{_DATA}*")):
            left.unlink()
        self._write(_RUN, self.fingerprint)

    @torch.no_grad()
    def restore(
        self, model: nn.Module, modifier: Modifier, layer: str
    ) -> list[nn.Module]:
        """Read a layer into the model: tensors, masks and the journal's entries.

        :return: the modules that have changed
        """
        modules: dict[str, nn.Module] = {}
        path = self.folder / self._file(modifier, layer)
        with safe_open(path, "pt") as file:
            entries = json.loads(file.metadata()["journal"])
            for key in file.keys():  # noqa: SIM118 (it is not a mapping)
                name, _, tensor = key.rpartition(":")
                modules.setdefault(name, model.get_submodule(name))
                if tensor != _MASK:
                    write_parameter(modules[name], tensor, file.get_tensor(key))
            for name, module in modules.items():
                clear_mask(module)
                if f"{name}:{_MASK}" in file.keys():  # noqa: SIM118
                    shape = cast(Tensor, module.weight).shape
                    bits = file.get_tensor(f"{name}:{_MASK}").numpy()
                    set_mask(module, from_bits(bits, shape))
        journal.entries(model).extend(map(_from_json, entries))
        return list(modules.values())

    def name_of(self, model: nn.Module, module: nn.Module) -> str:
        """Return the name of a module within the model."""
        if module not in self._names:
            self._names = {m: name for name, m in model.named_modules()}
        return self._names[module]

    def finish_pass(self, modifier: Modifier, layers: Sequence[str]) -> None:
        """Record that the pass of a modifier is complete.

        :param layers: the layers of the pass, each already saved
        """
        if is_source() and self._lock.held:
            self._write(f"{self._stem(modifier)}{_PASS}", list(layers))

    def finished_pass(self, modifier: Modifier) -> list[str] | None:
        """Return a pass's layers if it was complete when the run started, else None."""
        name = f"{self._stem(modifier)}{_PASS}"
        if name not in self._passes:
            return None
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def save_data(self, name: str, content: object) -> None:
        """Write calibration data that the run has made, as JSON; one process writes."""
        file = f"{_DATA}{name}.json"
        self._data.add(file)
        if not is_source():
            return
        if not self._lock.held:
            self._create()
        self._write(file, content)

    def read_data(self, name: str) -> Any:
        """Return calibration data from an earlier run or from this one, or None."""
        file = f"{_DATA}{name}.json"
        if file not in self._data:
            return None
        return json.loads((self.folder / file).read_text(encoding="utf-8"))

    @property
    def has_data(self) -> bool:
        """Whether calibration data is on disk."""
        return bool(self._data)

    def discard(self) -> None:
        """Remove what this run has written, unless it continues an earlier one."""
        if not self._created:
            return
        self.close()
        shutil.rmtree(self.folder)
        if self._created_output and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def _write(self, name: str, content: object) -> None:
        with new_file(self.folder / name) as partial:
            partial.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _to_json(entry: journal.Entry) -> dict[str, Any]:
    return {
        "modifier": entry.modifier,
        "layer": entry.layer,
        "figures": entry.measurements,
    }


def _from_json(entry: dict[str, Any]) -> journal.Entry:
    return journal.Entry(entry["modifier"], entry["layer"], entry["figures"])


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module, not those of its children."""
    named = [
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ]
    return dict(named)
