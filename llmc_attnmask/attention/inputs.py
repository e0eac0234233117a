"""What a module was called with, kept to be replayed sample by sample."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from llmc_attnmask.attention.capture import UnsupportedAttentionError


class ModuleInputs:
    """Arguments of one module's forward, collected sample by sample on CPU.

    Masks and rotary tables that are equal from sample to sample are kept once.
    """

    def __init__(self) -> None:
        self._samples: list[tuple[Tensor, list[Any], Any]] = []
        # (leaf position, shape, dtype) -> the last such tensor seen there
        self._recent: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def append(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Add every sample of one forward call; a batch of B gives B samples."""
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
            own = hidden[b : b + 1].detach().to("cpu", copy=True)
            self._samples.append((own, sample, structure))

    def _once(self, position: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().to("cpu")
        key = (position, leaf.shape, leaf.dtype)
        recent = self._recent.get(key)
        if recent is not None and torch.equal(recent, leaf):
            return recent
        self._recent[key] = leaf.clone()
        return self._recent[key]

    @property
    def hidden(self) -> list[Tensor]:
        """The hidden states of every sample, [1, L, D]."""
        return [hidden for hidden, _, _ in self._samples]

    def batch(
        self,
        indices: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        hidden: Sequence[Tensor] | None = None,
    ) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments for the named samples at once.

        :param indices: samples of one length
        :param hidden: hidden states of every sample, instead of the collected ones
        :return: (args, kwargs), floating-point tensors in ``dtype`` on ``device``; the
            attention mask, which is [L, L], stays in its own
        """
        samples = [self._samples[i] for i in indices]
        states = torch.cat([(hidden or self.hidden)[i] for i in indices])
        leaves = [
            _joined(column) for column in zip(*(s[1] for s in samples), strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, samples[0][2])

        masks = {k: kwargs.pop(k) for k in ("attention_mask",) if k in kwargs}

        def to(tensor: Tensor) -> Tensor:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.to(device=device, dtype=kind)

        args, kwargs = tree_map_only(Tensor, to, ([states, *args], kwargs))
        on_device = tree_map_only(Tensor, lambda mask: mask.to(device), masks)
        return args, kwargs | on_device

    def minibatches(
        self, indices: Sequence[int], size: int, generator: torch.Generator
    ) -> Iterator[list[int]]:
        """Endless batches of at most ``size`` samples of equal length, shuffled."""
        while True:
            order = torch.randperm(len(indices), generator=generator).tolist()
            yield from self.batches([indices[i] for i in order], size)

    def batches(self, indices: Sequence[int], size: int) -> Iterator[list[int]]:
        """The given samples once, in batches of at most ``size`` of equal length."""
        pending: dict[torch.Size, list[int]] = {}
        for i in indices:
            group = pending.setdefault(self._samples[i][0].shape, [])
            group.append(i)
            if len(group) == size:
                yield group
                del pending[self._samples[i][0].shape]
        yield from pending.values()


def _sample_of(leaf: Any, b: int, batch: int) -> Any:
    shared = not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != batch
    return leaf if shared or batch == 1 else leaf[b : b + 1]


def _joined(column: tuple[Any, ...]) -> Any:
    first = column[0]
    if not isinstance(first, Tensor) or all(leaf is first for leaf in column):
        return first  # one row broadcasts over the batch
    if first.ndim == 0 or first.shape[0] != 1:
        raise UnsupportedAttentionError(
            f"an argument of shape {tuple(first.shape)} differs from sample to sample "
            "and has no batch dimension to join it on; calibrate with batch_size: 1 in "
            "the modifier"
        )
    return torch.cat(column)
