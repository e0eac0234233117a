"""What of one checkpoint folder goes into another beside the weights."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from llmc_attnmask.checkpoint.io.files import CONFIG, INDEX, Checkpoint, is_pickled


def check_apart(directory: Path, output: Path) -> None:
    """Refuse to write a checkpoint into the one it is made from.

    :raises ValueError: if the output is the folder itself or one within
    """
    if output.resolve().is_relative_to(directory.resolve()):
        raise ValueError(
            f"output {output} is within {directory}, whose files it would be a copy of "
            "and a part of; name a folder elsewhere"
        )


def copy_others(checkpoint: Checkpoint, output: Path) -> list[str]:
    """Copy what is neither config, index nor weights, links as the files they lead to.

    :return: what was left behind because it is pickled
    :raises ValueError: for links to folders, pipes and devices, which have no end
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
    """Paths within the folder."""
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
                    f"{path} is neither a file nor a folder but a link to nothing or "
                    "to a folder, a pipe or a device; remove it"
                )
