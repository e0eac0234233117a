"""Store the arguments that a module was called with, to replay them by sample."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from llmc_attnmask.calibration.samples import Offload, SampleTensors


class UnbatchableArgumentError(ValueError):
    """An argument that differs from sample to sample but has no batch dimension."""


@dataclass(frozen=True)
class _Stored:
    """A placeholder for a tensor among a sample's arguments."""

    index: int


class ModuleInputs:
    """The arguments of one module's forward, collected sample by sample.

    Masks and rotary tables that are the same for several samples are stored once.

    :param offload: where the tensors are stored; with "disk", only those that one batch
        needs are in memory
    """

    def __init__(self, offload: Offload = "cpu") -> None:
        self.offload: Offload = offload
        self.clear()

    def clear(self) -> None:
        """Forget all samples."""
        self.hidden = SampleTensors(self.offload)  # the hidden states, [1, L, D]
        self._others = SampleTensors(self.offload)
        # per sample: its arguments' leaves, tensors as _Stored, and their structure
        self._arguments: list[tuple[list[Any], Any]] = []
        # (leaf position, shape, dtype) -> the last such tensor at that position
        self._recent: dict[tuple[int, torch.Size, torch.dtype], _Stored] = {}

    def __len__(self) -> int:
        return len(self._arguments)

    def append(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Add every sample of one forward call; a batch of B adds B samples."""
        kwargs = dict(kwargs)
        # a cache of earlier tokens belongs to generation, not to calibration
        for cache in ("past_key_values", "past_key_value", "layer_past"):
            if cache in kwargs:
                kwargs[cache] = None
        args = list(args)
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        rest = (args[1:] if args and args[0] is hidden else args, kwargs)
        leaves, structure = tree_flatten(rest)
        batch = hidden.shape[0]
        for b in range(batch):
            sample = [
                self._once(i, _sample_of(leaf, b, batch))
                for i, leaf in enumerate(leaves)
            ]
            self._arguments.append((sample, structure))
            self.hidden.append(hidden[b : b + 1].detach().to("cpu", copy=True))

    def _once(self, position: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().to("cpu")
        key = (position, leaf.shape, leaf.dtype)
        recent = self._recent.get(key)
        if recent is None or not torch.equal(self._others[recent.index], leaf):
            recent = self._recent[key] = _Stored(self._others.append(leaf.clone()))
        return recent

    def batch(
        self,
        samples: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        hidden: Sequence[Tensor] | None = None,
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return positional and keyword arguments for several samples at once.

        :param samples: indices of samples of one length
        :param hidden: hidden states of all samples, instead of the collected ones
        :raises UnbatchableArgumentError: if an argument cannot be joined into a batch
        :return: (args, kwargs), with floating-point tensors in ``dtype`` on ``device``;
            the attention mask, which is [L, L], keeps its own dtype
        """
        arguments = [self._arguments[sample] for sample in samples]
        states = torch.cat([(hidden or self.hidden)[sample] for sample in samples])
        leaves = [
            self._joined(column)
            for column in zip(*(leaves for leaves, _ in arguments), strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, arguments[0][1])

        masks = {k: kwargs.pop(k) for k in ("attention_mask",) if k in kwargs}

        def to(tensor: Tensor) -> Tensor:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.to(device=device, dtype=kind)

        args, kwargs = tree_map_only(Tensor, to, ([states, *args], kwargs))
        on_device = tree_map_only(Tensor, lambda mask: mask.to(device), masks)
        return args, kwargs | on_device

    def batches(self, samples: Sequence[int], size: int) -> Iterator[list[int]]:
        """Yield each sample once, in batches of at most ``size`` of one length."""
        pending: dict[torch.Size, list[int]] = {}
        for sample in samples:
            shape = self.hidden.shape(sample)
            group = pending.setdefault(shape, [])
            group.append(sample)
            if len(group) == size:
                yield group
                del pending[shape]
        yield from pending.values()

    def _joined(self, column: tuple[Any, ...]) -> Any:
        """Join an argument of several samples; one that all share is not repeated."""
        first = column[0]
        if not isinstance(first, _Stored):
            return first
        if all(leaf == first for leaf in column):
            return self._others[first.index]
        tensors = [self._others[leaf.index] for leaf in column]
        if tensors[0].ndim == 0 or tensors[0].shape[0] != 1:
            raise UnbatchableArgumentError(
                f"an argument of shape {tuple(tensors[0].shape)} differs from sample "
                "to sample and has no batch dimension to join it along; calibrate with "
                "batch_size: 1 in the modifier"
            )
        return torch.cat(tensors)


def _sample_of(leaf: Any, b: int, batch: int) -> Any:
    shared = not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != batch
    return leaf if shared or batch == 1 else leaf[b : b + 1]
