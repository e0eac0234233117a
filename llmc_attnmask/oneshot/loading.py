"""Load the model that a recipe runs on: into memory, or backed by files on disk."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import CompressedTensorsConfig

from llmc_attnmask.calibration.samples import Offload
from llmc_attnmask.calibration.scratch import scratch
from llmc_attnmask.checkpoint.load import load

_MOST_OF_GPU = 0.7  # of the free memory, for weights; the rest is for activations


@contextmanager
def loaded(
    model: str | Path, config: PreTrainedConfig, offload: Offload
) -> Iterator[PreTrainedModel]:
    """Load a model; if it is offloaded to disk, it can be used only within the block.

    :param offload: where weights are kept until used: in memory ("cpu"), or in the
        checkpoint's files and, once they have changed, in the scratch folder ("disk")
    :raises ValueError: for a quantized or packed model that would be offloaded to disk
    """
    if offload == "cpu":
        yield load(model, **_dequantized(config))
        return
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{model} is quantized or packed, so it cannot be offloaded to disk; load "
            "it into memory, or, if it is only packed, run `llmc-attnmask unpack` first"
        )
    with tempfile.TemporaryDirectory(
        prefix="offloaded-weights-", dir=scratch()
    ) as folder:
        # offloaded by accelerate, which `oneshot` converts to its own offloading
        yield load(
            model,
            device_map={"": "disk"},
            offload_folder=folder,
            offload_buffers=True,
        )


def _dequantized(config: PreTrainedConfig) -> dict[str, CompressedTensorsConfig]:
    """Return arguments that load a quantized model as floats, as ``oneshot`` needs."""
    quantization = getattr(config, "quantization_config", None) or {}
    if not quantization.get("config_groups"):
        return {}
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


@contextmanager
def on_gpu(model: PreTrainedModel) -> Iterator[None]:
    """Have a model in memory on the GPU within the block, if there is room for it."""
    if model.device.type != "cpu" or not torch.cuda.is_available():
        yield
        return
    free, _ = torch.cuda.mem_get_info()
    if model.get_memory_footprint() > _MOST_OF_GPU * free:
        yield
        return
    model.to("cuda")  # type: ignore[arg-type]
    try:
        yield
    finally:
        model.to("cpu")  # type: ignore[arg-type]
        torch.cuda.empty_cache()
