"""Load a transformers model from any storage, one tensor after another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from llmc_attnmask.checkpoint.config import dense_config, packed_storage
from llmc_attnmask.checkpoint.io.files import TensorSpec, open_checkpoint
from llmc_attnmask.checkpoint.selection import packed_layers
from llmc_attnmask.checkpoint.source import (
    read_config,
    read_weights,
    reading_errors,
    stored,
)

# Arguments of from_pretrained that select the files.
_HUB = ("revision", "cache_dir", "token", "local_files_only")


def load(model: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a checkpoint of any storage, quantized or not.

    For a dense-stored checkpoint this gives the same as
    ``AutoModelForCausalLM.from_pretrained``, which would fill the packed layers of a
    packed one with random weights. Packed layers are unpacked as the model takes them,
    so that peak memory is that of the dense model and one tensor.

    Pickled weights are never read, and none of the model's own code runs unless the
    caller passes ``trust_remote_code=True``.

    :param model: local folder or Hub name
    :param kwargs: arguments of ``from_pretrained``, such as ``dtype`` and ``revision``
    :raises ValueError: if files cannot be read or do not fit together
    """
    trust = kwargs.pop("trust_remote_code", False)
    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    config = read_config(model, trust_remote_code=trust, **hub)
    directory = Path(model)
    if directory.is_dir() and not trust:
        read_weights(directory, config)
    if not packed_storage(stored(config)):
        with reading_errors(model):
            made: Any = AutoModelForCausalLM.from_pretrained(
                model,
                trust_remote_code=trust,
                use_safetensors=True,
                output_loading_info=True,
                **kwargs,
            )
        return _complete(model, *made)
    if not directory.is_dir():
        directory = Path(snapshot_download(str(model), **hub))
    checkpoint = open_checkpoint(directory)
    packed = packed_layers(checkpoint)
    state: dict[str, Any] = {}
    parts = {t.name for u in packed for t in u.parts.values()}
    for tensor in checkpoint.tensors.values():
        if tensor.name not in parts:
            state[tensor.name] = _Lazy(tensor, tensor.load)
    for layer in packed:
        (spec,) = layer.outputs
        state[spec.name] = _Lazy(spec, layer.load)
    quantization = dense_config(stored(config), []).get("quantization_config")
    if quantization is None:
        del config.quantization_config
    else:
        config.quantization_config = quantization
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"transformers has no causal language model for {type(config).__name__}, "
            "so it cannot be loaded packed; run `llmc-attnmask unpack` first"
        )
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    with reading_errors(directory):
        made = kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **kwargs
        )
    loaded = _complete(directory, *made)
    loaded.name_or_path = loaded.config.name_or_path = str(model)
    if (directory / "generation_config.json").exists():
        loaded.generation_config = GenerationConfig.from_pretrained(directory)
    return loaded


def _complete(
    model: str | Path, loaded: PreTrainedModel, report: dict[str, Any]
) -> PreTrainedModel:
    """Refuse a model whose missing tensors transformers filled with random values."""
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{model} has no {missing[0]}, nor {len(missing) - 1} more of the tensors "
            f"that {type(loaded).__name__} needs; the checkpoint is incomplete"
        )
    return loaded


class _Lazy:
    """A tensor of the state dict that is read when transformers indexes it.

    It has the methods of a slice of a safetensors file, which transformers expects.
    """

    def __init__(self, spec: TensorSpec, read: Callable[[], Tensor]):
        self._spec, self._read = spec, read
        self.dtype = spec.torch_dtype
        self.shape = torch.Size(spec.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self._spec.dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point
