"""Give up a layer's dense weight as soon as it has arrived, on a CPU.

vLLM loads all weights before it processes the first. A layer is packed by its weight
loader instead, so that memory holds one dense layer at a time, not all of them.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase

from llmc_attnmask.checkpoint.layouts.sparse_24_bitmask import NotTwoOfFourError
from llmc_attnmask.serving import freed_memory, made_up
from llmc_attnmask.serving.cpu_layer import CpuLayer, Packed, Rows
from llmc_attnmask.serving.kernels import self_check
from llmc_attnmask.serving.kernels.cpu import weights
from llmc_attnmask.serving.kernels.cpu.op import cpu_sparse_linear
from llmc_attnmask.serving.kernels.select import VARIABLE, Choice, keep_dense
from llmc_attnmask.serving.rival import Rival
from llmc_attnmask.serving.scales import by_row

GAIN = 1.03  # times dense's speed; below, noise would decide
TOKENS = (1, 5, 17)  # of the check: in one pass, and by tiles


class WrongError(Exception):
    """A kernel gives wrong results on this machine; the message says how."""


def not_two_of_four(name: str) -> ValueError:
    """Make the error for a layer whose weights contradict config.json."""
    return ValueError(
        f"{name} is 2:4 according to config.json, but its weights are not; prune the "
        f"model again, or serve it with {VARIABLE}=dense"
    )


class CpuPacking:
    """Packs one layer, when its last part arrives or when vLLM processes it."""

    def __init__(
        self,
        name: str,
        layer: Any,
        stock: LinearMethodBase,
        parts: Sequence[Rows],
        shards: int,
        choose: Callable[[Any], Choice],
    ) -> None:
        """
        :param name: the layer's, for messages
        :param layer: with its parameters, which are not loaded yet
        :param parts: what the checkpoint says about the layer's rows
        :param shards: in how many tensors the weight arrives, unless in one
        :param choose: selects the layer's kernel
        """
        self.name = name
        self._layer = weakref.ref(layer)  # vLLM keeps weight loaders longer
        self.stock = stock
        self.parts = parts
        self.shards = shards
        self._choose = choose
        self._choice: Choice | None = None
        self._packed: list[Packed] = []
        self._arrived: set[Any] = set()
        self._stays_dense = False
        weight = getattr(layer, "weight", None)
        if weight is not None:
            self._load: Callable[..., None] = weight.weight_loader
            weight.weight_loader = self._loaded

    @property
    def layer(self) -> Any:
        """The layer."""
        return self._layer()

    # vLLM's reload binds arguments by these names
    def _loaded(
        self, param: Parameter, loaded_weight: Tensor, *shard: Any, **named: Any
    ) -> None:
        self._load(param, loaded_weight, *shard, **named)
        if param.is_meta or self._stays_dense:  # a reload that counts entries, or any
            return
        given = named.get("loaded_shard_id", getattr(loaded_weight, "shard_id", None))
        self._arrived.add(shard[0] if shard else given)
        # without an id, the tensor was the whole layer's
        if None in self._arrived or len(self._arrived) == self.shards:
            self._pack()
            freed_memory.give_back()

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
        for name in ("weight_scale", "input_scale", "input_zero_point"):
            if hasattr(layer, name):
                delattr(layer, name)
        # LoRA reads the device from it; vLLM's own layers keep it as well
        layer.weight = Parameter(layer.weight.new_empty(0), requires_grad=False)
        self._packed, self._choice = [], None  # a reload packs again
        return served

    def keep_dense(self) -> None:
        """Load the layer as its stock method does from now on."""
        self._stays_dense = True

    def _pack(self) -> None:
        self._arrived = set()
        choice = self._choose(self.layer)
        self._choice = choice
        if choice.few != "avx512":
            return
        weight = self.layer.weight.data
        rival = Rival(self.layer, self.stock) if choice.timed else None
        try:
            self._packed = [_packed(weight, rows, rival) for rows in self.parts]
        except NotTwoOfFourError:
            raise not_two_of_four(self.name) from None
        except WrongError as wrong:
            self._choice = keep_dense(f"{choice.label} failed its check: {wrong}")
            return
        found = " and ".join(map(self._described, self._packed))
        if all(part.sparse is None for part in self._packed):
            self._packed = []
            self._choice = keep_dense(found)
            return
        note = f"; {made_up.NOTE}" if made_up.NOTE in choice.reason else ""
        self._choice = replace(choice, reason=found + note)
        self.layer.weight.data = weight.new_empty(0)

    def _described(self, part: Packed) -> str:
        text: str = part.rows.structure
        if len(self.parts) > 1:
            text += f" ({part.rows.last - part.rows.first} rows)"
        if part.ratio is None:
            return text
        if part.sparse is None:
            return f"{text} would have {part.ratio:.2f} x dense's speed"
        return f"{text}, {part.ratio:.1f} x as fast as dense"


def _packed(weight: Tensor, rows: Rows, rival: Rival | None) -> Packed:
    part = weight[rows.first : rows.last]
    if rows.structure == "dense":
        return Packed(rows, None, None, part.clone(), None)
    make = weights.two_of_four if rows.structure == "2:4" else weights.any_mask
    sparse = make(part)
    sums = part.sum(1, dtype=torch.int32) if weight.dtype == torch.int8 else None
    _check(part, sparse, sums)
    ratio = rival.ratio(sparse, part) if rival is not None else None
    if ratio is not None and ratio < GAIN:
        return Packed(rows, None, None, part.clone(), ratio)
    return Packed(rows, sparse, sums, None, ratio)


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
