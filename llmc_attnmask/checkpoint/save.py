"""Writing a pruned model: what llm-compressor saves, then its 2:4 layers' storage.

One way to write each file: llm-compressor's ``save_pretrained`` writes the weights,
dense or quantized, ``pack`` packs them. 2:4 layers are those whose weights are, to the
bit, in what was written.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from compressed_tensors.distributed import is_source_process
from transformers import PreTrainedModel

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.checkpoint.atomic import updated_folder
from llmc_attnmask.checkpoint.config import Storage, dense_config
from llmc_attnmask.checkpoint.convert import (
    CheckpointWarning,
    NothingToPackError,
    pack,
    two_of_four_layers,
    write_json,
)
from llmc_attnmask.checkpoint.files import CONFIG, open_checkpoint


class _SaveAs:
    """``save_pretrained`` of one model, in place of llm-compressor's around it."""

    # llm-compressor's sign that it has wrapped a model already
    _overridden = True

    def __init__(self, upstream: Callable[..., None], storage: Storage):
        self.upstream, self.storage = upstream, storage

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub would upload the files before their 2:4 layers are marked "
                "or packed; save without it, then upload the folder"
            )
        output = Path(save_directory)
        if not is_source_process():  # upstream lets only one process write
            self.upstream(save_directory, *args, **kwargs)
        else:
            with updated_folder(output) as partial:
                self.upstream(str(partial), *args, **kwargs)
                store(partial, self.storage)
        if dist.is_initialized():
            dist.barrier()


def save_as(model: PreTrainedModel, storage: Storage) -> None:
    """Have ``model.save_pretrained`` write this storage from now on.

    :param model: as ``oneshot`` has prepared it, so that its ``save_pretrained`` is
        llm-compressor's
    """
    current = model.save_pretrained
    upstream = current.upstream if isinstance(current, _SaveAs) else current
    model.save_pretrained = _SaveAs(upstream, storage)  # type: ignore[assignment]


def store(directory: Path, storage: Storage) -> None:
    """Give a dense-stored checkpoint the marker of its 2:4 layers, or pack them.

    If none can be packed it is left dense, with a warning that says why.
    """
    mark(directory)
    if storage == "dense":
        return
    packed = directory / ".packed"
    try:
        pack(directory, packed, only_2of4=True)
    except NothingToPackError as error:
        warnings.warn(f"{error}; saved dense", CheckpointWarning, stacklevel=2)
        return
    for path in packed.iterdir():
        path.replace(directory / path.name)
    packed.rmdir()


def mark(directory: Path) -> list[str]:
    """Write the marker of a dense-stored checkpoint's 2:4 layers to its config.

    :return: their names
    """
    checkpoint = open_checkpoint(directory)
    layers = two_of_four_layers(checkpoint)
    config = dict(checkpoint.config)
    # llm-compressor copies the config of the model it started from, which may have been
    # packed or marked
    config.pop(marker.KEY, None)
    config = dense_config(config, layers)
    if config != checkpoint.config:
        write_json(directory / CONFIG, config)
    return layers
