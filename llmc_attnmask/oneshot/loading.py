"""The model that a recipe runs on: in memory, or in the files of its checkpoint."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import CompressedTensorsConfig

from llmc_attnmask.calibration.samples import Offload
from llmc_attnmask.calibration.scratch import scratch
from llmc_attnmask.checkpoint.load import load


@contextmanager
def loaded(
    model: str | Path, config: PreTrainedConfig, offload: Offload
) -> Iterator[PreTrainedModel]:
    """The model; offloaded to disk, it exists as long as this context does.

    :param offload: where weights wait for their turn: in memory ("cpu"), or in the
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
        # accelerate's offloading, which `oneshot` turns into its own
        yield load(
            model,
            device_map={"": "disk"},
            offload_folder=folder,
            offload_buffers=True,
        )


def _dequantized(config: PreTrainedConfig) -> dict[str, CompressedTensorsConfig]:
    """Arguments that load a quantized checkpoint as floats, which ``oneshot`` needs."""
    quantization = getattr(config, "quantization_config", None) or {}
    if not quantization.get("config_groups"):
        return {}
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
