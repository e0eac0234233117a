"""Files and folders that appear only once they are complete."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmc_attnmask.checkpoint.io.files import CONFIG

_SAVING = ".saving-"
# How transformers names a model's weights; an adapter next to them has another name.
_WEIGHTS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)


# The progress of an interrupted run, within its output folder: as long as this exists,
# the folder is not a finished checkpoint.
PROGRESS = ".progress"


def check_new(output: Path, resume: bool = False) -> None:
    """Refuse, before hours of work, a folder that could not be created at the end.

    :param resume: whether the folder may hold the progress of an interrupted run
    :raises FileExistsError: if it exists and is not empty
    :raises PermissionError: if it, or the folder to create it in, cannot be written to
    """
    if (output / PROGRESS).is_dir():
        if not resume:
            raise FileExistsError(
                f"output {output} holds an interrupted run; run the same command with "
                "--resume to continue it, or remove the folder to start over"
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"output {output} exists and is not empty; name a new folder or remove it"
        )
    output = output.resolve()
    parent = next(p for p in (output, *output.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"output {output} cannot be created: {parent} is not a writable folder"
        )


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file that becomes ``path`` at the end, replacing any old one.

    From then on it survives a power cut. If anything fails, it is removed.
    """
    partial = path.with_name(f".{path.name}")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``output`` at the end.

    After an error or an interrupt it is removed, and ``output`` is as it was. The
    progress of the run within ``output`` is removed once everything else is there.

    :raises FileExistsError, PermissionError: as ``check_new``
    """
    check_new(output, resume=True)
    for left in output.glob(f"{_SAVING}*"):  # by a run killed while saving
        shutil.rmtree(left)
    with updated_folder(output) as partial:
        yield partial
    if (output / PROGRESS).is_dir():
        _drop_progress(output)


def _drop_progress(output: Path) -> None:
    """Remove the progress in one step, once the checkpoint is on the disk."""
    for path in output.iterdir():
        if path.is_file():
            _sync(path)
    # renamed first: neither a kill nor a file that NFS keeps open leaves half of it
    dropped = output / f"{_SAVING}{PROGRESS}"
    (output / PROGRESS).rename(dropped)
    shutil.rmtree(dropped, ignore_errors=True)


@contextmanager
def updated_folder(output: Path) -> Iterator[Path]:
    """Like ``new_folder``, but replace existing files one by one at the end.

    Files with other names stay, except weights that would mix with the new ones.
    """
    output = output.resolve()  # "." and a link to a folder have no name of their own
    if not output.exists():
        with _renamed(output) as partial:
            yield partial
        return
    # inside it, because it may be the root of a disk
    partial = Path(tempfile.mkdtemp(prefix=_SAVING, dir=output))
    try:
        yield partial
        written = {path.name for path in partial.iterdir()}
        if CONFIG in written:
            # without a config, nothing takes the unfinished folder for a checkpoint
            (output / CONFIG).unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == CONFIG):
            target = output / path.name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            if path.name == CONFIG:
                _remove_other_weights(output, written)
            path.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_other_weights(output: Path, written: set[str]) -> None:
    """Remove weights of an earlier save, unless only a variant's were written."""
    if not any(_WEIGHTS.fullmatch(name) for name in written):
        return
    for path in output.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in written:
            path.unlink()


@contextmanager
def _renamed(output: Path) -> Iterator[Path]:
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
