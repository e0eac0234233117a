"""What is in a checkpoint, layer by layer, read from its safetensors files alone."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llmc_attnmask.checkpoint import layout
from llmc_attnmask.checkpoint.convert import packed_parts
from llmc_attnmask.checkpoint.files import StoredTensor, open_checkpoint
from llmc_attnmask.checkpoint.transfer import Unpack


@dataclass(frozen=True)
class LayerInfo:
    """One weight matrix on disk."""

    name: str  # module path
    # dtype of a dense weight, after it "sparse-24-bitmask" if stored so; "packed" for
    # integers packed in words
    format: str
    shape: tuple[int, ...]  # of the dense matrix, but of the words if "packed"
    sparsity: float | None  # share of entries that are zero; None if packed
    two_of_four: bool | None  # at most two non-zeros in every four inputs of a row
    bytes: int


def inspect(directory: str | Path) -> list[LayerInfo]:
    """Every weight matrix of a checkpoint, one tensor in memory at a time.

    :param directory: folder with .safetensors files
    :raises FileNotFoundError: if there are none, or the index names one that is missing
    :raises ValueError: if one cannot be read or its tensors do not fit together
    """
    checkpoint = open_checkpoint(directory)
    packed = {layer.compressed.name: layer for layer in packed_parts(checkpoint)}
    layers: list[LayerInfo] = []
    for tensors in checkpoint.shards.values():
        for tensor in sorted(tensors, key=lambda tensor: tensor.name):
            if tensor.name in packed:
                layers.append(_packed(packed[tensor.name]))
            elif (info := _dense(tensor)) is not None:
                layers.append(info)
    return layers


def _packed(layer: Unpack) -> LayerInfo:
    parts = (layer.compressed, layer.bitmask, layer.shape)
    (spec,) = layer.outputs
    weight = layer.load()
    return LayerInfo(
        name=layer.module,
        format=f"{_dtype(weight)} {layout.NAME}",
        shape=spec.shape,
        sparsity=_sparsity(_is_zero(weight)),
        two_of_four=True,
        bytes=sum(part.bytes for part in parts),
    )


def _dense(tensor: StoredTensor) -> LayerInfo | None:
    module, _, kind = tensor.name.rpartition(".")
    if len(tensor.shape) != 2 or kind not in ("weight", "weight_packed"):
        return None
    if kind == "weight_packed":
        return LayerInfo(module, "packed", tensor.shape, None, None, tensor.bytes)
    weight = tensor.load()
    zero = _is_zero(weight)
    two_of_four = weight.shape[1] % 4 == 0 and bool(
        (zero.view(-1, 4).sum(-1) >= 2).all()
    )
    return LayerInfo(
        module, _dtype(weight), tensor.shape, _sparsity(zero), two_of_four, tensor.bytes
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _sparsity(zero: Tensor) -> float:
    return zero.sum().item() / max(1, zero.numel())


def _is_zero(tensor: Tensor) -> Tensor:
    # float8 has no comparison on every device
    return (tensor.float() if tensor.element_size() == 1 else tensor) == 0
