"""Describe a checkpoint layer by layer, from its safetensors files alone."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from llmc_attnmask.checkpoint.io.files import StoredTensor, TensorSpec, open_checkpoint
from llmc_attnmask.checkpoint.layouts.bits import INTEGERS
from llmc_attnmask.checkpoint.selection import packed_parts
from llmc_attnmask.checkpoint.transfers.base import Unpack

_BITS = INTEGERS | {8: torch.int64}


@dataclass(frozen=True)
class LayerInfo:
    """One weight matrix on disk."""

    name: str  # module path
    # dtype of the dense weight, followed by its storage unless that is dense; "packed"
    # for integers packed into words
    format: str
    shape: tuple[int, ...]  # of the dense matrix; of the words if "packed"
    sparsity: float | None  # share of entries that are zero; None if packed
    # whether at most two of every four inputs of a row are not +0.0, so that the layer
    # can be packed: -0.0, left by multiplying a weight by its mask, counts as a zero in
    # ``sparsity``, but packing has to keep it
    two_of_four: bool | None
    bytes: int


def inspect(directory: str | Path) -> list[LayerInfo]:
    """Describe every weight matrix of a checkpoint, with about a megabyte in memory.

    :param directory: folder with .safetensors files
    :raises FileNotFoundError: if there are none, or if the index names a missing one
    :raises ValueError: if one cannot be read or its tensors do not fit together
    """
    checkpoint = open_checkpoint(directory)
    packed = {
        layer.parts["compressed"].name: layer for layer in packed_parts(checkpoint)
    }
    layers: list[LayerInfo] = []
    for tensors in checkpoint.shards.values():
        for tensor in sorted(tensors, key=lambda tensor: tensor.name):
            if tensor.name in packed:
                layers.append(_packed(packed[tensor.name]))
            elif (info := _dense(tensor)) is not None:
                layers.append(info)
    return layers


def _packed(layer: Unpack) -> LayerInfo:
    (spec,) = layer.outputs
    found = _Found(spec)
    for _, rows in layer.rows():
        found.add(rows)
    return LayerInfo(
        name=layer.module,
        format=f"{_dtype(spec)} {layer.storage}",
        shape=spec.shape,
        sparsity=found.zeros / max(1, prod(spec.shape)),
        two_of_four=found.two_of_four,
        bytes=sum(part.bytes for part in layer.parts.values()),
    )


def _dense(tensor: StoredTensor) -> LayerInfo | None:
    module, _, kind = tensor.name.rpartition(".")
    if len(tensor.shape) != 2 or kind not in ("weight", "weight_packed"):
        return None
    if kind == "weight_packed":
        return LayerInfo(module, "packed", tensor.shape, None, None, tensor.bytes)
    found = _Found(tensor)
    for _, block in tensor.blocks(tensor.itemsize * (4 if found.two_of_four else 1)):
        found.add(block.view(_BITS[tensor.itemsize]))
    return LayerInfo(
        name=module,
        format=_dtype(tensor),
        shape=tensor.shape,
        sparsity=found.zeros / max(1, prod(tensor.shape)),
        two_of_four=found.two_of_four,
        bytes=tensor.bytes,
    )


class _Found:
    """What the blocks of a matrix have shown so far."""

    def __init__(self, spec: TensorSpec) -> None:
        self._dtype = spec.torch_dtype
        self.two_of_four = spec.shape[1] % 4 == 0
        self.zeros = 0

    def add(self, bits: Tensor) -> None:
        """
        :param bits: consecutive entries as integers, whole groups of four inputs
        """
        self.zeros += _zeros(bits, self._dtype)
        if self.two_of_four:
            self.two_of_four = bool((bits.view(-1, 4).bool().sum(-1) <= 2).all())


def _dtype(tensor: TensorSpec) -> str:
    return str(tensor.torch_dtype).removeprefix("torch.")


def _zeros(bits: Tensor, dtype: torch.dtype) -> int:
    """Count the entries that are zero, -0.0 included.

    :param bits: the entries as integers of the same size, any shape
    """
    zeros = int((bits == 0).sum())
    if dtype.is_floating_point:
        zeros += int((bits == torch.iinfo(bits.dtype).min).sum())
    return zeros
