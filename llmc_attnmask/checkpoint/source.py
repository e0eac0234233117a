"""What transformers reads of a model: none of the model's own code runs, and whatever
is wrong with its files is one error that names it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from llmc_attnmask.checkpoint.config import is_packed
from llmc_attnmask.checkpoint.io.files import CONFIG, Checkpoint, open_checkpoint
from llmc_attnmask.checkpoint.io.json_files import read_mapping

# A stored entry stands for at most so many weights: 2-bit integers in 32-bit words.
_WEIGHTS_PER_ENTRY = 16
# Entries that a model may have beyond that: tables that depend on positions alone.
_SPARE_ENTRIES = 1 << 26


def read_config(model: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """A model's config, checked as far as anything here relies on it.

    :param model: local folder or hub name
    :param kwargs: of ``from_pretrained``
    :raises ValueError, OSError: naming the model
    """
    if Path(model).is_dir():
        read_mapping(Path(model) / CONFIG)
    with reading_errors(model):
        kwargs = {"trust_remote_code": False, **kwargs}
        config: PreTrainedConfig = AutoConfig.from_pretrained(model, **kwargs)
        is_packed(stored(config))
    return config


def read_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    :raises ValueError, OSError: naming the model
    """
    with reading_errors(model):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def read_weights(directory: Path, config: PreTrainedConfig) -> Checkpoint:
    """The headers of a model folder's weights, which must be as many as config.json
    makes one expect: what is missing would be made up, however large.

    :raises ValueError, OSError: for files that cannot be read, or are too small
    """
    checkpoint = open_checkpoint(directory)
    entries = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(checkpoint.tensors):
        raise ValueError(
            f"{directory / CONFIG} has num_hidden_layers {layers}, but there are only "
            f"{len(checkpoint.tensors)} tensors beside it"
        )
    with reading_errors(directory), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    needed = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    if needed > _WEIGHTS_PER_ENTRY * entries + _SPARE_ENTRIES:
        raise ValueError(
            f"{directory / CONFIG} describes a model of {needed} weights, but the "
            f"files beside it have {entries} entries"
        )
    return checkpoint


def stored(config: PreTrainedConfig) -> dict[str, Any]:
    """The part of a config that says how weights are stored."""
    return {"quantization_config": getattr(config, "quantization_config", None)}


@contextmanager
def reading_errors(model: str | Path) -> Iterator[None]:
    """Name the model in errors, which transformers raises of many kinds.

    :raises ValueError: for whatever its files have made go wrong
    :raises OSError, ImportError, MemoryError, torch.OutOfMemoryError: as they are
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{model} needs code of its own (auto_map in its config), which is not "
                "run. If you have read that code and trust it, load the model in "
                "Python, llmc_attnmask.load(..., trust_remote_code=True), and hand it "
                "to oneshot(model=...)"
            ) from error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{model} cannot be read: {kind}{error}") from error
