"""Writing a pruned model: what llm-compressor saves, then its 2:4 layers' storage.

One way to write each file: llm-compressor's ``save_pretrained`` writes the weights,
dense or quantized, ``pack`` packs them. 2:4 layers are those whose weights are, to the
bit, in what was written.
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

# A shard is mapped into memory whole: when it is checked and, of a model on disk, when
# it is written. llm-compressor's own default is 20 GB.
_MAX_SHARD_SIZE = "1GB"

SaveHook = Callable[[PreTrainedModel], Callable[[Path, Path], None]]


class _SaveAs:
    """``save_pretrained`` of one model, in place of llm-compressor's around it."""

    # llm-compressor's sign that it has wrapped a model already
    _overridden = True

    def __init__(
        self,
        model: PreTrainedModel,
        upstream: Callable[..., None],
        storage: Storage,
        save_hook: SaveHook | None,
    ):
        self.model, self.upstream, self.storage = model, upstream, storage
        self.save_hook = save_hook

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
            # asked before upstream compresses the weights that are in the model
            write = self.save_hook(self.model) if self.save_hook else None
            with updated_folder(output) as partial:
                with disk_errors(partial):
                    self.upstream(str(partial), *args, **kwargs)
                store(partial, self.storage)
                if write is not None:
                    write(partial, output)
        barrier()


def save_as(
    model: PreTrainedModel, storage: Storage, save_hook: SaveHook | None = None
) -> None:
    """Have ``model.save_pretrained`` write this storage from now on.

    :param model: as ``oneshot`` has prepared it, so that its ``save_pretrained`` is
        llm-compressor's
    :param save_hook: called with the model before it is written; what that returns
        is called with the folder in which the checkpoint lies before it appears, and
        with the folder where it will appear, to add files of its own
    """
    current = model.save_pretrained
    upstream = current.upstream if isinstance(current, _SaveAs) else current
    save = _SaveAs(model, upstream, storage, save_hook)
    model.save_pretrained = save  # type: ignore[assignment]


def _restore_experts(model: PreTrainedModel) -> None:
    """Undo what ``oneshot`` does to experts, where the result could not be loaded.

    It splits fused experts into Linears. transformers reads checkpoints of some models
    in that form; of others it would take random weights instead. Quantized experts stay
    Linears, which is the form that servers read.
    """
    quantized = any(hasattr(m, "quantization_scheme") for m in model.modules())
    if quantized or has_linearize_load_mappings(model.config.model_type):
        return
    for name, split in get_linearized_moes(model):
        fused = cast(nn.Module, split.to_experts_module())
        if isinstance(split, GptOssLinearExperts):
            # upstream puts gate and up side by side, but here they alternate
            for parameter in ("gate_up_proj", "gate_up_proj_bias"):
                halves = getattr(fused, parameter).detach().unflatten(-1, (2, -1))
                alternating = halves.transpose(-1, -2).flatten(-2)
                update_offload_parameter(fused, parameter, alternating)
        model.set_submodule(name, fused)
