"""Copy what a checkpoint folder contains besides its weights into another folder."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from llmc_attnmask.checkpoint.io.files import CONFIG, INDEX, Checkpoint, is_pickled


def check_apart(directory: Path, output: Path) -> None:
    """Refuse to write a checkpoint into the one that it is made from.

    :raises ValueError: if the output is the folder itself or inside it
    """
    if output.resolve().is_relative_to(directory.resolve()):
        raise ValueError(
            f"output {output} is inside {directory}, the checkpoint that it would be "
            "made from; name a folder elsewhere"
        )


def copy_others(checkpoint: Checkpoint, output: Path) -> list[str]:
    """Copy all files but config, index and weights; a link is copied as its target.

    :return: files that were not copied because they are pickled
    :raises ValueError: for links to folders, pipes and devices, which may have no end
    """
    pickled = []
    for path in _other_files(checkpoint):
        if is_pickled(path):
            pickled.append(str(path))
            continue
        target = output / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoint.directory / path, target)
    return pickled


def _other_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield paths relative to the folder."""
    directory = checkpoint.directory
    known = {directory / name for name in (CONFIG, INDEX, *checkpoint.shards)}
    folders = [directory]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if path in known or path.name.startswith("."):
                continue
            if path.is_dir() and not path.is_symlink():
                folders.append(path)
            elif path.is_file():
                yield path.relative_to(directory)
            else:
                raise ValueError(
                    f"{path} is neither a file nor a folder but a broken link, a link "
                    "to a folder, a pipe or a device; remove it"
                )
