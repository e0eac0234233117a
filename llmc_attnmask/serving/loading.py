"""Load packed shards of a fused layer as its dense weight, one shard at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask, sparse_bitmask

Deliver = Callable[[Tensor, Any], None]
_LAYOUTS: dict[str, Any] = {
    layout.NAME: layout for layout in (sparse_24_bitmask, sparse_bitmask)
}


class ShardLoader:
    """Collects the tensors of a shard, in any order, and delivers it dense.

    It delivers the whole shard, as a checkpoint that is stored dense has it. The loader
    of the dense weight then takes each rank's part of it.
    """

    def __init__(
        self,
        name: str,
        storage: str,
        shards: int,
        weight: Tensor,
        deliver: Deliver,
    ):
        """
        :param name: the layer's name, for messages
        :param storage: as config.json calls it
        :param shards: how many of the layer's parts are packed
        :param weight: the dense weight; shards are unpacked where it is
        :param deliver: called with each dense shard [rows, columns] and its id
        """
        self.name = name
        self._layout = _LAYOUTS[storage]
        # the tensors of one shard, as the checkpoint names them
        self.parts: tuple[str, ...] = self._layout.Packed._fields
        self.shards = shards
        self.device = weight.device
        self.dtype = weight.dtype
        self.deliver = deliver
        self.delivered = 0
        self._waiting: dict[Any, dict[str, Tensor]] = {}

    def loader(self, part: str) -> Callable[..., None]:
        """Return the weight loader of one of ``parts``, with vLLM's signature."""
        return partial(self._receive, part)

    def _receive(
        self, part: str, parameter: nn.Parameter, tensor: Tensor, shard: Any = None
    ) -> None:
        if shard is None:  # newer loaders set it on the tensor
            shard = getattr(tensor, "shard_id", None)
        parts = self._waiting.setdefault(shard, {})
        parts[part] = tensor
        if len(parts) < len(self.parts):
            return
        del self._waiting[shard]
        dense = self._unpacked(parts, shard)
        if shard is not None:
            dense.shard_id = shard  # type: ignore[attr-defined]
        self.deliver(dense, shard)
        self.delivered += 1

    def _unpacked(self, parts: dict[str, Tensor], shard: Any) -> Tensor:
        found, expected = parts["compressed"].dtype, self.dtype
        floats = found.is_floating_point and expected.is_floating_point
        if found != expected and not (
            floats and found.itemsize > 1 < expected.itemsize
        ):
            raise ValueError(
                f"{self._shard(shard)} has values of {found}; expected {expected}, as "
                "config.json describes the weight"
            )
        device = torch.device("cpu") if self.device.type == "meta" else self.device
        try:
            # the shape is read on the CPU
            there = {k: p if k == "shape" else p.to(device) for k, p in parts.items()}
            dense: Tensor = self._layout.unpack(**there)
            return dense
        except ValueError as error:
            raise ValueError(f"{self._shard(shard)} cannot be unpacked: {error}") from (
                error
            )

    def check_complete(self) -> None:
        """Refuse a layer that the checkpoint has only in part.

        :raises ValueError: if tensors are missing; the message names them
        """
        for shard, parts in self._waiting.items():
            missing = [part for part in self.parts if part not in parts]
            raise ValueError(
                f"{self._shard(shard)} is incomplete: the checkpoint has no "
                f"{', '.join(missing)} for it; download or pack it again"
            )
        if self.delivered < self.shards:
            raise ValueError(
                f"{self.name} has {self.shards} packed parts according to config.json, "
                f"but the checkpoint has {self.delivered}; download or pack it again"
            )

    def _shard(self, shard: Any) -> str:
        return self.name if shard is None else f"part {shard} of {self.name}"
