"""Mark or pack the sparse layers of a checkpoint that llm-compressor has written."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.checkpoint.config import Storage, dense_config
from llmc_attnmask.checkpoint.convert import to_packed, write_json
from llmc_attnmask.checkpoint.io.files import CONFIG, open_checkpoint
from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask
from llmc_attnmask.checkpoint.linears import decoder_linears
from llmc_attnmask.checkpoint.selection import (
    CheckpointWarning,
    NothingToPackError,
    two_of_four_layers,
    unstructured_layers,
)


def store(directory: Path, storage: Storage) -> None:
    """Give a dense-stored checkpoint the marker of its sparse layers, or pack them.

    If none can be packed, the checkpoint stays dense, with a warning that says why.
    """
    mark(directory)
    if storage == "dense":
        return
    with TemporaryDirectory(prefix=".packed-", dir=directory.parent) as packed:
        try:
            to_packed(
                directory,
                packed,
                storage=storage,
                only_2of4=storage == sparse_24_bitmask.NAME,
            )
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
    linears = decoder_linears(checkpoint)
    layers = two_of_four_layers(linears)
    config = dict(checkpoint.config)
    # llm-compressor copies the config of the model that it started from, which may have
    # been packed or marked
    config.pop(marker.KEY, None)
    config = dense_config(config, layers, unstructured_layers(linears, set(layers)))
    if config != checkpoint.config:
        write_json(directory / CONFIG, config)
    return layers
