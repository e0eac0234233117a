"""Which rows of which Linear are an attention module's q, k, v and o.

Query heads share key-value heads in groups (GQA): with H query heads on G key-value
heads of dimension dh, q has H * dh rows and k has G * dh, head by head.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmc_attnmask.attention.capture import (
    UnsupportedAttentionError,
    uses_attention_interface,
)

Role = Literal["q", "k", "v", "o"]

# Names of the Linear children, architecture by architecture.
_SEPARATE: tuple[dict[Role, str], ...] = (
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},  # Llama, Qwen, Gemma
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"},  # OPT
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "dense"},  # Phi
)
_FUSED: tuple[dict[str, str], ...] = (
    {"qkv": "qkv_proj", "o": "o_proj"},  # Phi3
)


@dataclass(frozen=True)
class Projection:
    """One of q, k, v, o: ``rows`` of the weight [out, in] of the Linear ``child``."""

    role: Role
    child: str  # name of the Linear within the attention module
    rows: slice
    columns: int  # in-features

    @property
    def parameter(self) -> str:
        """Name of the weight within the attention module."""
        return f"{self.child}.weight"

    def of(self, weight: Tensor) -> Tensor:
        """This projection's rows of its Linear's weight, a view [rows, columns]."""
        return weight[self.rows]


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of everything that looks like an attention with projections."""
    return {
        name: module
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower()
        and any(isinstance(child, nn.Linear | Conv1D) for child in module.children())
    }


def find_projections(attention: nn.Module) -> dict[Role, Projection]:
    """q, k, v and o of an attention module.

    :raises UnsupportedAttentionError: if its softmax cannot be seen or its Linears are
        not of a known layout; the message says what was found
    """
    kind = type(attention).__name__
    if not uses_attention_interface(attention):
        raise UnsupportedAttentionError(
            f"{kind} computes its softmax itself instead of calling transformers' "
            "attention interface, so its attention matrix cannot be seen"
        )
    linears = {
        name: child
        for name, child in attention.named_children()
        if isinstance(child, nn.Linear)
    }
    for separate in _SEPARATE:
        if set(separate.values()) <= linears.keys():
            _check_query_rows(attention, linears[separate["q"]])
            return {
                role: _whole(role, name, linears[name])
                for role, name in separate.items()
            }
    for fused in _FUSED:
        if set(fused.values()) <= linears.keys():
            return _sliced(attention, fused["qkv"], fused["o"], linears)
    known = [" ".join(names.values()) for names in _SEPARATE]
    known += [" ".join(names.values()) for names in _FUSED]
    raise UnsupportedAttentionError(
        f"{kind} has the Linear layers {sorted(linears)}, which are none of the known "
        f"layouts: {'; '.join(known)} (Conv1D layers, as in GPT-2, are not supported)"
    )


def _check_query_rows(attention: nn.Module, query: nn.Linear) -> None:
    """Refuse rows of q that are no query, such as the gate of Qwen3-Next."""
    config: Any = getattr(attention, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(attention, "head_dim", None)
    if heads and head_dim and query.out_features != heads * head_dim:
        raise UnsupportedAttentionError(
            f"{type(attention).__name__} has {query.out_features} rows of q where its "
            f"{heads} heads of {head_dim} would have {heads * head_dim}: part of them "
            "(an output gate?) does not enter the attention matrix"
        )


def _whole(role: Role, name: str, linear: nn.Linear) -> Projection:
    return Projection(role, name, slice(0, linear.out_features), linear.in_features)


def _sliced(
    attention: nn.Module, qkv: str, o: str, linears: dict[str, nn.Linear]
) -> dict[Role, Projection]:
    """q, then k, then v, stacked along the rows of one Linear."""
    config: Any = attention.config
    query_rows = int(config.num_attention_heads * attention.head_dim)
    rows, columns = linears[qkv].out_features, linears[qkv].in_features
    key_rows = (rows - query_rows) // 2
    ends = {"q": query_rows, "k": query_rows + key_rows, "v": rows}
    found: dict[Role, Projection] = {}
    start = 0
    for role in ("q", "k", "v"):
        found[role] = Projection(role, qkv, slice(start, ends[role]), columns)
        start = ends[role]
    found["o"] = _whole("o", o, linears[o])
    return found
