"""Read a model's config, tokenizer and headers, with errors that name the model.

None of the model's own code runs, and anything wrong with its files becomes one error
that names the model.
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

from llmc_attnmask.checkpoint.config import sparsity_config
from llmc_attnmask.checkpoint.io.files import CONFIG, Checkpoint, open_checkpoint
from llmc_attnmask.checkpoint.io.json_files import read_mapping

# A stored entry holds at most this many weights: 2-bit integers in 32-bit words.
_WEIGHTS_PER_ENTRY = 16
# Entries that a model may have beyond that: tables that depend only on positions.
_SPARE_ENTRIES = 1 << 26


def read_config(model: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """Read a model's config and check the parts that this package relies on.

    :param model: local folder or Hub name
    :param kwargs: arguments of ``from_pretrained``
    :raises ValueError, OSError: if it cannot be read; the message names the model
    """
    if Path(model).is_dir():
        read_mapping(Path(model) / CONFIG)
    with reading_errors(model):
        kwargs = {"trust_remote_code": False, **kwargs}
        config: PreTrainedConfig = AutoConfig.from_pretrained(model, **kwargs)
        sparsity_config(stored(config))
    return config


def read_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Read a model's tokenizer.

    :raises ValueError, OSError: if it cannot be read; the message names the model
    """
    with reading_errors(model):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def read_weights(directory: Path, config: PreTrainedConfig) -> Checkpoint:
    """Read the headers of a model folder's weights and compare them with config.json.

    Fewer weights than the config describes are refused: transformers would create the
    missing ones, however large.

    :raises ValueError, OSError: for files that cannot be read or are too small
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
    """Return the part of a config that says how weights are stored."""
    return {"quantization_config": getattr(config, "quantization_config", None)}


@contextmanager
def reading_errors(model: str | Path) -> Iterator[None]:
    """Name the model in the many kinds of errors that transformers raises.

    :raises ValueError: for anything that the model's files have caused
    :raises OSError, ImportError, MemoryError, torch.OutOfMemoryError: unchanged
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
                "Python with llmc_attnmask.load(..., trust_remote_code=True) and pass "
                "it to oneshot(model=...)"
            ) from error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{model} cannot be read: {kind}{error}") from error
