"""Replay an attention module with other weights and see what its softmax sees.

Every architecture of transformers passes its final query, key and value (after q/k
norms and rotary embedding) to the *attention interface*. A replica of the module that
uses the interface of this file therefore exposes them, differentiably, for every
architecture.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface

_INTERFACE = "llmc_attnmask_capture"


class UnsupportedAttentionError(ValueError):
    """The attention module cannot be replayed; the message says why."""


@dataclass(frozen=True)
class AttentionCall:
    """What a module passed to the attention interface.

    B samples, H query heads, G key-value heads (H a multiple of G), L tokens.
    """

    query: Tensor  # [B, H, L, dh]
    key: Tensor  # [B, G, L, dh]
    value: Tensor  # [B, G, L, dv]
    mask: Tensor | None  # any float, added to the logits; broadcasts to [B, H, L, L]
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = (
        None  # [H] logits of a column that is dropped after the softmax
    )


class _Captured(BaseException):
    """Carries the call out of the module; nothing after the softmax is needed."""

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
            f"{type(module).__name__} is causal but received no mask that hides "
            "future tokens: calibrate with eager attention (attn_implementation)"
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
    given = arguments.get("is_causal")
    return bool(getattr(module, "is_causal", False) if given is None else given)


AttentionInterface.register(_INTERFACE, _capture)


class AttentionReplica:
    """A private copy of an attention module that runs with any weights.

    The original stays untouched: no hook fires and no parameter moves. The copy is held
    in ``dtype`` on ``device``, so it needs the memory of one attention module.

    :param attention: module of a transformers model, offloaded or not
    :param dtype: floating-point type of the copy's parameters and of its arithmetic
    :param device: where to compute; by default, where the parameters are
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
        """Return what a Linear of the module reads when attention is the model's own.

        That is its eager attention, not the interface of this file.

        :param child: name of the Linear within the module
        """
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
    """Return whether a module's forward looks up transformers' attention functions."""
    forward = type(attention).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def isolated_copy(
    module: nn.Module, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Copy a module so that nothing is shared: no tensor, no hook, no offloading."""

    def to(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(device=device, dtype=kind, copy=True)

    # Offloading replaces `_parameters` with caches that a deep copy must not follow.
    # The memo tells deepcopy in advance what the copies of these dictionaries are.
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
