"""Run modifiers on a model in memory with ``oneshot``."""

from collections.abc import Iterable

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmc_attnmask.calibration.memory import reuse_freed_memory
from llmc_attnmask.calibration.micro_batches import share
from llmc_attnmask.calibration.samples import Offload
from llmc_attnmask.distributed import rank, world_size


def set_defaults(
    modifiers: Iterable[Modifier], seed: int, offload: Offload | None
) -> None:
    """Set what a recipe leaves open.

    :param offload: where activations are kept; by default where modifiers say
    """
    for name, value in (("seed", seed), ("offload_activations", offload)):
        for modifier in modifiers:
            given = name in modifier.model_fields_set
            if hasattr(modifier, name) and not given and value is not None:
                setattr(modifier, name, value)


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    modifiers: list,
    windows: Tensor,
) -> None:
    """Run modifiers on a model in memory, calibrated on the windows in their order.

    :param windows: int64 [windows, length]; the same on every rank, each of which
        takes its share
    :raises ValueError: if there are fewer windows than ranks
    """
    reuse_freed_memory()
    own = windows[share(len(windows), windows.shape[1], rank(), world_size())]
    samples = [
        {"input_ids": window, "attention_mask": torch.ones_like(window)}
        for window in own
    ]
    # a loader, because llm-compressor would sort the samples of a dataset by length
    loader: DataLoader = DataLoader(samples, batch_size=1)  # type: ignore[arg-type]
    oneshot(model=model, tokenizer=tokenizer, dataset=loader, recipe=modifiers)
