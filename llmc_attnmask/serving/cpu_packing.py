"""Give up a layer's dense weight as soon as it has arrived, on a CPU.

vLLM loads all weights before it processes the first. A layer is packed by its weight
loader instead, so that memory holds one dense layer at a time, not all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase

from llmc_attnmask.serving import made_up
from llmc_attnmask.serving.cpu_layer import CpuLayer, Packed, Rows
from llmc_attnmask.serving.kernels import self_check
from llmc_attnmask.serving.kernels.cpu import weights
from llmc_attnmask.serving.kernels.cpu.op import cpu_sparse_linear
from llmc_attnmask.serving.kernels.select import Choice, keep_dense
from llmc_attnmask.serving.rival import Rival
from llmc_attnmask.serving.scales import by_row

TOKENS = (1, 5, 17)  # of the check: in one pass, and by tiles


class WrongError(Exception):
    """A kernel gives wrong results on this machine; the message says how."""


class CpuPacking:
    """Packs one layer, when its last part arrives or when vLLM processes it."""

    def __init__(
        self,
        layer: Any,
        stock: LinearMethodBase,
        parts: Sequence[Rows],
        shards: int,
        choose: Callable[[Any], Choice],
    ) -> None:
        """
        :param layer: with its parameters, which are not loaded yet
        :param parts: what the checkpoint says about the layer's rows
        :param shards: in how many tensors the weight arrives, unless in one
        :param choose: selects the layer's kernel
        """
        self.layer = layer
        self.stock = stock
        self.parts = parts
        self.shards = shards
        self._choose = choose
        self._choice: Choice | None = None
        self._packed: list[Packed] = []
        self._arrived: set[Any] = set()
        weight = getattr(layer, "weight", None)
        if weight is not None:
            self._load: Callable[..., None] = weight.weight_loader
            weight.weight_loader = self._loaded

    def _loaded(self, parameter: Parameter, tensor: Tensor, *shard: Any) -> None:
        self._load(parameter, tensor, *shard)
        given = shard[0] if shard else getattr(tensor, "shard_id", None)
        self._arrived.add(given)
        # without an id, the tensor was the whole layer's
        if given is None or len(self._arrived) == self.shards:
            self._pack()

    @property
    def choice(self) -> Choice:
        """The layer's kernel; asking for it packs the layer."""
        if self._choice is None:
            self._pack()
        assert self._choice is not None
        return self._choice

    def serve(self) -> CpuLayer:
        """Replace the layer's parameters by the packed parts."""
        layer, scale = self.layer, None
        if layer.weight.dtype == torch.int8:
            scale = by_row(layer.weight_scale.data, layer.logical_widths)
        served = CpuLayer(layer, self.stock, self._packed, scale)
        first = next(part.sparse for part in self._packed if part.sparse is not None)
        tensor = next(form for form in first[2:] if form is not None)
        for name in ("weight", "weight_scale", "input_scale", "input_zero_point"):
            if hasattr(layer, name):
                delattr(layer, name)
        # LoRA reads the device from a parameter of this name
        layer.weight_packed = Parameter(tensor, requires_grad=False)
        self._packed.clear()
        return served

    def _pack(self) -> None:
        choice = self._choose(self.layer)
        self._choice = choice
        if choice.few != "avx512":
            return
        weight = self.layer.weight.data
        rival = Rival(self.layer, self.stock) if choice.timed else None
        try:
            self._packed = [_packed(weight, rows, rival) for rows in self.parts]
        except WrongError as wrong:
            self._choice = keep_dense(f"{choice.label} failed its check: {wrong}")
            return
        ratios = [f"{ratio:.1f}" for ratio in rival.ratios] if rival else []
        if all(part.sparse is None for part in self._packed):
            self._packed.clear()
            self._choice = keep_dense(
                f"sparse would have {' and '.join(ratios)} x dense's speed"
            )
            return
        found = " and ".join(
            f"{rows.structure} ({rows.last - rows.first} rows)"
            if len(self.parts) > 1
            else rows.structure
            for rows in self.parts
        )
        speed = f", {' and '.join(ratios)} x as fast as dense" if ratios else ""
        note = f"; {made_up.NOTE}" if made_up.NOTE in choice.reason else ""
        self._choice = replace(choice, reason=f"{found}{speed}{note}")
        self.layer.weight.data = weight.new_empty(0)


def _packed(weight: Tensor, rows: Rows, rival: Rival | None) -> Packed:
    part = weight[rows.first : rows.last]
    if rows.structure == "dense":
        return Packed(rows, None, None, part.clone())
    make = weights.two_of_four if rows.structure == "2:4" else weights.any_mask
    sparse = make(part)
    sums = part.sum(1, dtype=torch.int32) if weight.dtype == torch.int8 else None
    _check(part, sparse, sums)
    if rival is not None and rival.wins(sparse, part):
        return Packed(rows, None, None, part.clone())
    return Packed(rows, sparse, sums, None)


def _check(weight: Tensor, sparse: weights.Weight, sums: Tensor | None) -> None:
    """Compare the kernel with the dense product, once per shape.

    :raises WrongError: if they differ
    """
    scale = None
    if sums is not None:
        scale = torch.ones(len(weight), dtype=torch.float32)

    def multiply(x: Tensor, token_scale: Tensor | None) -> Tensor:
        return cpu_sparse_linear(x, *sparse, scale, sums, token_scale)

    key = (*weight.shape, weight.dtype, "cpu", sparse.tiles is None)
    wrong = self_check.once(key, multiply, weight, scale, TOKENS, torch.bfloat16)
    if wrong:
        raise WrongError(wrong)
