"""Count what a server reads per generated token, to predict a speed-up.

Decoding one token of one sequence reads every weight once and computes little with it,
so its time is the time to read the weights. A sparse kernel reads two values of every
four and one bit per entry; a dense one reads every value. The prediction ignores the
KV cache, activations, and any bandwidth that a kernel does not reach.
"""

from collections.abc import Set
from dataclasses import dataclass
from math import prod

from llmc_attnmask.checkpoint.io.files import Checkpoint
from llmc_attnmask.checkpoint.linears import (
    decoder_linears,
    mixed_groups,
    output_layer,
)
from llmc_attnmask.checkpoint.selection import packed_parts

_SPARSE_SIZES = {1, 2}  # bytes per value for which sparse kernels exist


@dataclass(frozen=True)
class TokenBytes:
    """Bytes that one token reads of one Linear."""

    layer: str
    dense: int  # by a dense kernel
    sparse: int  # by a sparse kernel, or by a dense one where none applies


def bytes_per_token(checkpoint: Checkpoint, two_of_four: Set[str]) -> list[TokenBytes]:
    """Count the bytes of every Linear of the decoder layers, then of the output layer.

    A 2:4 layer that servers fuse with a layer that is not 2:4 counts as dense.

    :param two_of_four: names of the layers that are 2:4
    """
    dense = decoder_linears(checkpoint)
    packed = {layer.module: layer.outputs[0] for layer in packed_parts(checkpoint)}
    sparse = (dense.keys() | packed.keys()) & two_of_four
    for inside, _ in mixed_groups(sparse, [*dense, *packed]):
        sparse -= set(inside)
    found = []
    head = output_layer(checkpoint)
    for name, tensor in [*dense.items(), *packed.items(), *head.items()]:
        full = prod(tensor.shape) * tensor.itemsize
        short = full // 2 + prod(tensor.shape) // 8
        applies = name in sparse and tensor.itemsize in _SPARSE_SIZES
        found.append(TokenBytes(name, full, short if applies else full))
    for tensor in checkpoint.tensors.values():
        name, _, kind = tensor.name.rpartition(".")
        if kind == "weight_packed":  # 4-bit integers: no sparse kernel reads these
            found.append(TokenBytes(name, tensor.bytes, tensor.bytes))
    return found
