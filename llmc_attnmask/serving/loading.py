"""Load packed shards of a fused layer as its dense weight, one shard at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmc_attnmask.checkpoint import layout

PARTS = ("compressed", "bitmask", "shape")  # of one shard, as the checkpoint names them
Deliver = Callable[[Tensor, Any], None]


class ShardLoader:
    """Collects the three tensors of a shard, in any order, and delivers it dense.

    It delivers the whole shard, as a checkpoint that is stored dense has it. The loader
    of the dense weight then takes each rank's part of it.
    """

    def __init__(self, name: str, shards: int, device: torch.device, deliver: Deliver):
        """
        :param name: the layer's name, for messages
        :param shards: how many of the layer's parts are packed
        :param device: where to unpack
        :param deliver: called with each dense shard [rows, columns] and its id
        """
        self.name = name
        self.shards = shards
        self.device = device
        self.deliver = deliver
        self.delivered = 0
        self._waiting: dict[Any, dict[str, Tensor]] = {}

    def loader(self, part: str) -> Callable[..., None]:
        """Return the weight loader of one of ``PARTS``, with vLLM's signature."""
        return partial(self._receive, part)

    def _receive(
        self, part: str, parameter: nn.Parameter, tensor: Tensor, shard: Any = None
    ) -> None:
        if shard is None:  # newer loaders set it on the tensor
            shard = getattr(tensor, "shard_id", None)
        parts = self._waiting.setdefault(shard, {})
        parts[part] = tensor
        if len(parts) < len(PARTS):
            return
        del self._waiting[shard]
        dense = self._unpacked(parts, shard)
        if shard is not None:
            dense.shard_id = shard  # type: ignore[attr-defined]
        self.deliver(dense, shard)
        self.delivered += 1

    def _unpacked(self, parts: dict[str, Tensor], shard: Any) -> Tensor:
        device = torch.device("cpu") if self.device.type == "meta" else self.device
        try:
            return layout.unpack(
                parts["compressed"].to(device),
                parts["bitmask"].to(device),
                parts["shape"],
            )
        except ValueError as error:
            raise ValueError(f"{self._shard(shard)} cannot be unpacked: {error}") from (
                error
            )

    def check_complete(self) -> None:
        """Refuse a layer that the checkpoint has only in part.

        :raises ValueError: if tensors are missing; the message names them
        """
        for shard, parts in self._waiting.items():
            missing = [part for part in PARTS if part not in parts]
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
