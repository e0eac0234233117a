"""Find the rows of the Linears that are an attention module's q, k, v and o.

Query heads share key-value heads in groups (GQA): with H query heads on G key-value
heads of dimension dh, q has H * dh rows and k has G * dh, head by head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmc_attnmask.attention.capture import (
    UnsupportedAttentionError,
    uses_attention_interface,
)

Role = Literal["q", "k", "v", "o"]

# Names of the children of an attention module, layout by layout.
_SEPARATE: tuple[dict[Role, str], ...] = (
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},  # Llama, Qwen, Gemma
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"},  # OPT
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "dense"},  # Phi
    {"q": "q_lin", "k": "k_lin", "v": "v_lin", "o": "out_lin"},  # DistilBERT
    {"q": "query", "k": "key", "v": "value"},  # BERT, whose o is outside the module
)
# q, k and v stacked in one Linear
_STACKED: tuple[dict[str, str], ...] = (
    {"qkv": "qkv_proj", "o": "o_proj"},  # Phi-3
    {"qkv": "Wqkv", "o": "Wo"},  # ModernBERT
    {"qkv": "c_attn", "o": "c_proj"},  # GPT-2
)
# q, k and v of the first head, then of the second...
_INTERLEAVED: tuple[dict[str, str], ...] = (
    {"qkv": "query_key_value", "o": "dense"},  # GPT-NeoX, Persimmon
)
# Multi-head latent attention: k (without its rotary part) and v share a Linear, head by
# head; q has its own, with or without a latent space before it.
_LATENT: tuple[dict[str, str], ...] = (
    {"q": "q_b_proj", "kv": "kv_b_proj", "o": "o_proj"},  # DeepSeek-V3
    {"q": "q_proj", "kv": "kv_b_proj", "o": "o_proj"},  # DeepSeek-V2-Lite
)


@dataclass(frozen=True)
class Projection:
    """One of q, k, v, o: some rows of the weight [out, in] of the Linear ``child``."""

    role: Role
    child: str  # name of the Linear within the attention module
    rows: slice | list[int]
    columns: int  # in-features
    whole: bool = True  # whether these are all rows of the Linear
    transposed: bool = False  # a Conv1D, whose weight is [in, out]

    @property
    def parameter(self) -> str:
        """Name of the weight within the attention module."""
        return f"{self.child}.weight"

    def of(self, weight: Tensor) -> Tensor:
        """Return this projection's rows [rows, columns] of its Linear's weight."""
        return (weight.T.contiguous() if self.transposed else weight)[self.rows]

    def put(self, weight: Tensor, values: Tensor) -> None:
        """Write this projection's rows [rows, columns] into its Linear's weight."""
        (weight.T if self.transposed else weight)[self.rows] = values


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Map names to the modules that look like attention with projections."""
    return {
        name: module
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower()
        and any(isinstance(child, nn.Linear | Conv1D) for child in module.children())
    }


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Map names to the parents of attention modules, in the model's order."""
    names = dict.fromkeys(n.rpartition(".")[0] for n in attention_modules(model))
    return {name: model.get_submodule(name) for name in names}


def find_projections(attention: nn.Module) -> dict[Role, Projection]:
    """Find q, k, v and, if it is inside the module, o.

    :raises UnsupportedAttentionError: if the module's softmax cannot be seen or its
        Linears match no known layout; the message says what was found
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
        if isinstance(child, nn.Linear | Conv1D)
    }
    for separate in _SEPARATE:
        if set(separate.values()) <= linears.keys():
            _check_query_rows(attention, linears[separate["q"]])
            return {
                role: _rows(role, name, linears[name])
                for role, name in separate.items()
            }
    for stacked in _STACKED:
        if set(stacked.values()) <= linears.keys():
            # GPT-BigCode without shared keys is interleaved under GPT-2's names
            split = (
                _stacked if getattr(attention, "multi_query", True) else _interleaved
            )
            return split(attention, stacked["qkv"], stacked["o"], linears)
    for interleaved in _INTERLEAVED:
        if set(interleaved.values()) <= linears.keys():
            return _interleaved(
                attention, interleaved["qkv"], interleaved["o"], linears
            )
    for latent in _LATENT:
        if set(latent.values()) <= linears.keys():
            return _latent(attention, latent, linears)
    known = [" ".join(names.values()) for names in _SEPARATE]
    shared = (*_STACKED, *_INTERLEAVED, *_LATENT)
    known += [" ".join(names.values()) for names in shared]
    raise UnsupportedAttentionError(
        f"{kind} has the Linear layers {sorted(linears)}, which match none of the "
        f"known layouts: {'; '.join(known)}"
    )


def _shape(linear: nn.Module) -> tuple[int, int]:
    """Return the rows and columns of a weight as [out, in]."""
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    assert isinstance(linear, nn.Linear)
    return linear.out_features, linear.in_features


def _check_query_rows(attention: nn.Module, query: nn.Module) -> None:
    """Refuse rows of q that are not a query, such as the gate of Qwen3-Next."""
    config: Any = getattr(attention, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(attention, "head_dim", None)
    rows, _ = _shape(query)
    if heads and head_dim and rows != heads * head_dim:
        raise UnsupportedAttentionError(
            f"{type(attention).__name__} has {rows} rows of q, but its "
            f"{heads} heads of {head_dim} need {heads * head_dim}: some rows "
            "(an output gate?) do not enter the attention matrix"
        )


def _rows(
    role: Role, child: str, linear: nn.Module, rows: slice | list[int] | None = None
) -> Projection:
    """Describe some rows of a Linear; by default, all of them."""
    out, columns = _shape(linear)
    return Projection(
        role,
        child,
        slice(0, out) if rows is None else rows,
        columns,
        whole=rows is None,
        transposed=isinstance(linear, Conv1D),
    )


def _stacked(
    attention: nn.Module, qkv: str, o: str, linears: Mapping[str, nn.Module]
) -> dict[Role, Projection]:
    """Find q, then k, then v, stacked along the rows of one Linear."""
    config: Any = attention.config
    query_rows = int(config.num_attention_heads * attention.head_dim)
    rows, _ = _shape(linears[qkv])
    key_rows = (rows - query_rows) // 2
    ends = {"q": query_rows, "k": query_rows + key_rows, "v": rows}
    found: dict[Role, Projection] = {}
    start = 0
    for role in ("q", "k", "v"):
        found[role] = _rows(role, qkv, linears[qkv], slice(start, ends[role]))
        start = ends[role]
    found["o"] = _rows("o", o, linears[o])
    return found


def _interleaved(
    attention: nn.Module, qkv: str, o: str, linears: Mapping[str, nn.Module]
) -> dict[Role, Projection]:
    """Find, head by head, its q, its k and its v in one Linear."""
    config: Any = attention.config
    rows, _ = _shape(linears[qkv])
    width = rows // (3 * config.num_attention_heads)
    found: dict[Role, Projection] = {}
    roles: tuple[Role, ...] = ("q", "k", "v")
    for third, role in enumerate(roles):
        own = [i for i in range(rows) if i // width % 3 == third]
        found[role] = _rows(role, qkv, linears[qkv], own)
    found["o"] = _rows("o", o, linears[o])
    return found


def _latent(
    attention: nn.Module, names: Mapping[str, str], linears: Mapping[str, nn.Module]
) -> dict[Role, Projection]:
    """Find, head by head, its k and then its v in one Linear; q is in another."""
    config: Any = attention.config
    width = config.qk_nope_head_dim + config.v_head_dim
    rows, _ = _shape(linears[names["kv"]])
    shared = {
        "k": [i for i in range(rows) if i % width < config.qk_nope_head_dim],
        "v": [i for i in range(rows) if i % width >= config.qk_nope_head_dim],
    }
    return {
        "q": _rows("q", names["q"], linears[names["q"]]),
        "k": _rows("k", names["kv"], linears[names["kv"]], shared["k"]),
        "v": _rows("v", names["kv"], linears[names["kv"]], shared["v"]),
        "o": _rows("o", names["o"], linears[names["o"]]),
    }
