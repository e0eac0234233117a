"""Mark or pack the 2:4 layers of a checkpoint that llm-compressor has written."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.checkpoint.config import Storage, dense_config
from llmc_attnmask.checkpoint.convert import (
    CheckpointWarning,
    NothingToPackError,
    to_packed,
    two_of_four_layers,
    unstructured_layers,
    write_json,
)
from llmc_attnmask.checkpoint.io.files import CONFIG, open_checkpoint


def store(directory: Path, storage: Storage) -> None:
    """Give a dense-stored checkpoint the marker of its sparse layers, or pack 2:4 ones.

    If none can be packed, the checkpoint stays dense, with a warning that says why.
    """
    mark(directory)
    if storage == "dense":
        return
    with TemporaryDirectory(prefix=".packed-", dir=directory.parent) as packed:
        try:
            to_packed(directory, packed, only_2of4=True)
        except NothingToPackError as error:
            warnings.warn(f"{error}; saved dense", CheckpointWarning, stacklevel=2)
            return
        for path in Path(packed).iterdir():
            path.replace(directory / path.name)


def mark(directory: Path) -> list[str]:
    """Write the marker of a dense-stored checkpoint's sparse layers to its config.

    :return: names of the 2:4 layers
    """
    checkpoint = open_checkpoint(directory)
    layers = two_of_four_layers(checkpoint)
    config = dict(checkpoint.config)
    # llm-compressor copies the config of the model that it started from, which may have
    # been packed or marked
    config.pop(marker.KEY, None)
    config = dense_config(config, layers, unstructured_layers(checkpoint, set(layers)))
    if config != checkpoint.config:
        write_json(directory / CONFIG, config)
    return layers
