"""Let ``save_pretrained`` also mark or pack the 2:4 layers and write the report.

llm-compressor replaces a model's ``save_pretrained`` with its own, which writes the
weights, dense or quantized. This module wraps that: what was written is marked or
packed (``checkpoint/store.py``), and the report and model card are added.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from compressed_tensors.offload import update_offload_parameter
from llmcompressor.modeling.moe.conversion_mappings import has_linearize_load_mappings
from llmcompressor.modeling.moe.gpt_oss import GptOssLinearExperts
from llmcompressor.modeling.moe.linearize import get_linearized_moes
from torch import nn
from transformers import PreTrainedModel

from llmc_attnmask.checkpoint.config import Storage
from llmc_attnmask.checkpoint.io.atomic import updated_folder
from llmc_attnmask.checkpoint.io.writer import disk_errors
from llmc_attnmask.checkpoint.store import store
from llmc_attnmask.distributed import barrier, is_source
from llmc_attnmask.report.files import save_hook

# A whole shard is mapped into memory when it is checked and, for a model on disk, when
# it is written. llm-compressor's own default is 20 GB.
_MAX_SHARD_SIZE = "1GB"


class _SaveAs:
    """The ``save_pretrained`` of one model, which wraps llm-compressor's."""

    # llm-compressor reads this to see whether it has already wrapped a model
    _overridden = True

    def __init__(
        self,
        model: PreTrainedModel,
        upstream: Callable[..., None],
        storage: Storage,
    ):
        self.model, self.upstream, self.storage = model, upstream, storage

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub would upload the files before their 2:4 layers are marked "
                "or packed; save without it, then upload the folder"
            )
        kwargs.setdefault("max_shard_size", _MAX_SHARD_SIZE)
        output = Path(save_directory)
        _restore_experts(self.model)
        if not is_source():  # upstream lets only one process write
            self.upstream(save_directory, *args, **kwargs)
        else:
            # before upstream compresses the weights that are in the model
            write_report = save_hook(self.model)
            with updated_folder(output) as partial:
                with disk_errors(partial):
                    self.upstream(str(partial), *args, **kwargs)
                store(partial, self.storage)
                write_report(partial, output)
        barrier()


def save_as(model: PreTrainedModel, storage: Storage) -> None:
    """Have ``model.save_pretrained`` write this storage from now on, with the report.

    :param model: as ``oneshot`` has prepared it, so that its ``save_pretrained`` is
        llm-compressor's
    """
    current = model.save_pretrained
    upstream = current.upstream if isinstance(current, _SaveAs) else current
    model.save_pretrained = _SaveAs(model, upstream, storage)  # type: ignore[assignment]


def _restore_experts(model: PreTrainedModel) -> None:
    """Fuse experts again that ``oneshot`` has split, if they could not be loaded.

    For some models transformers reads checkpoints with experts split into Linears; for
    others it would use random weights instead. Quantized experts stay Linears, the form
    that servers read.
    """
    quantized = any(hasattr(m, "quantization_scheme") for m in model.modules())
    if quantized or has_linearize_load_mappings(model.config.model_type):
        return
    for name, split in get_linearized_moes(model):
        fused = cast(nn.Module, split.to_experts_module())
        if isinstance(split, GptOssLinearExperts):
            # upstream puts gate and up side by side, but in this model they alternate
            for parameter in ("gate_up_proj", "gate_up_proj_bias"):
                halves = getattr(fused, parameter).detach().unflatten(-1, (2, -1))
                alternating = halves.transpose(-1, -2).flatten(-2)
                update_offload_parameter(fused, parameter, alternating)
        model.set_submodule(name, fused)
