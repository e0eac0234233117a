"""Replay an attention module with other weights and see what its softmax sees.

Every architecture of transformers hands its final query, key and value (after q/k
norms and rotary embedding) to the *attention interface*. A replica of the module whose
interface is ours therefore shows them, differentiably, whatever the architecture.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from transformers import AttentionInterface

_INTERFACE = "llmc_attnmask_capture"


class UnsupportedAttentionError(ValueError):
    """The attention module cannot be replayed; the message says why."""


@dataclass(frozen=True)
class AttentionCall:
    """What a module handed to the attention interface.

    B samples, H query heads, G key-value heads (H a multiple of G), L tokens.
    """

    query: Tensor  # [B, H, L, dh]
    key: Tensor  # [B, G, L, dh]
    value: Tensor  # [B, G, L, dv]
    mask: Tensor | None  # any float, added to the logits; broadcasts to [B, H, L, L]
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None  # [H] logits of a column that is dropped again


class _Captured(BaseException):
    """Carries the call out of the module: what follows the softmax is not needed."""

    def __init__(self, call: AttentionCall):
        self.call = call


def _capture(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> None:
    if attention_mask is None and query.shape[2] > 1 and _causal(module, others):
        raise UnsupportedAttentionError(
            f"{type(module).__name__} is causal, but was handed no mask to hide the "
            "future with: calibrate with eager attention (attn_implementation)"
        )
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.where(attention_mask, 0.0, lowest).to(query.dtype)
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[-2]]
    if position_bias is not None:  # relative positions (T5): one more additive mask
        bias = position_bias.detach()
        attention_mask = bias if attention_mask is None else attention_mask + bias
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    raise _Captured(
        AttentionCall(query, key, value, attention_mask, scaling, softcap, s_aux)
    )


def _causal(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    wanted = arguments.get("is_causal")
    return bool(getattr(module, "is_causal", False) if wanted is None else wanted)


AttentionInterface.register(_INTERFACE, _capture)


class AttentionReplica:
    """A private copy of an attention module, to be run with any weights.

    The original is not touched: no hook fires, no parameter moves. The copy is held in
    ``dtype`` on ``device``, so the memory needed is one attention module.

    :param attention: module of a transformers model, offloaded or not
    :param dtype: floating-point type of the copy's parameters and of its arithmetic
    :param device: where to compute; by default where the parameters are
    :raises UnsupportedAttentionError: if the module has no transformers config
    """

    def __init__(
        self,
        attention: nn.Module,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        if not hasattr(getattr(attention, "config", None), "_attn_implementation"):
            raise UnsupportedAttentionError(
                f"{type(attention).__name__} has no transformers config, so its "
                "attention interface cannot be chosen"
            )
        parameter = next(attention.parameters())
        self.device = torch.device(parameter.device if device is None else device)
        self.dtype = dtype
        self.module = isolated_copy(attention, dtype, self.device)
        config: Any = self.module.config
        config._attn_implementation = _INTERFACE

    def __call__(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        weights: Mapping[str, Tensor] | None = None,
    ) -> AttentionCall:
        """Run the module's forward up to its softmax.

        :param args: positional arguments of the module's forward
        :param kwargs: keyword arguments of the module's forward
        :param weights: parameter name within the module -> tensor to use instead;
            gradients flow to it
        :raises UnsupportedAttentionError: if the module never calls the interface
        """
        try:
            functional_call(self.module, dict(weights or {}), tuple(args), dict(kwargs))
        except _Captured as captured:
            return captured.call
        raise UnsupportedAttentionError(
            f"{type(self.module).__name__} computes its softmax itself instead of "
            "calling transformers' attention interface, so its attention matrix "
            "cannot be seen"
        )

    def read_by(
        self, child: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """What a Linear of the module reads, with the module's own eager attention."""
        seen: list[Tensor] = []
        handle = self.module.get_submodule(child).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        config: Any = self.module.config
        config._attn_implementation = "eager"
        try:
            self.module(*args, **kwargs)
        finally:
            config._attn_implementation = _INTERFACE
            handle.remove()
        return seen[0]


def uses_attention_interface(attention: nn.Module) -> bool:
    """Whether the module's forward looks up transformers' attention functions."""
    forward = type(attention).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def isolated_copy(
    module: nn.Module, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A copy that shares nothing with the module: no tensor, no hook, no offloading."""

    def to(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(device=device, dtype=kind, copy=True)

    # Offloading replaces `_parameters` by caches that a deep copy must not follow:
    # deepcopy is told beforehand what the copies of these dictionaries are.
    memo: dict[int, Any] = {}
    for child in module.modules():
        memo[id(child._parameters)] = {
            name: None if p is None else nn.Parameter(to(p), requires_grad=False)
            for name, p in child._parameters.items()
        }
        memo[id(child._buffers)] = {
            name: None if b is None else to(b) for name, b in child._buffers.items()
        }
    replica = copy.deepcopy(module, memo)
    for child in replica.modules():
        child.__dict__.pop("forward", None)  # wrappers bound to the original
        for hooks in (
            child._forward_hooks,
            child._forward_pre_hooks,
            child._backward_hooks,
            child._backward_pre_hooks,
        ):
            hooks.clear()
    return replica.eval()


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
