"""Attention maps for the report: a few heads, the first tokens, 8 bits per entry.

They are stored as JSON values; the report draws them.
"""

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.matrix import first_rows

TOKENS = 96


@dataclass(frozen=True)
class AttentionMap:
    """One head's attention among the first tokens of one sample."""

    head: int
    error: float  # ||A - A~||_F^2 / ||A||_F^2 of this head, on these tokens' rows
    dense: np.ndarray  # float [tokens, tokens], queries down, keys across
    pruned: np.ndarray
    difference: np.ndarray  # pruned - dense

    def encode(self) -> dict[str, Any]:
        """Encode as JSON values: deflated bytes in base64.

        Attention is stored as 255 * sqrt(a), because most of it is small; the
        difference is stored in 127ths of its largest entry.
        """
        largest = float(np.abs(self.difference).max())
        scaled = self.difference / (largest or 1.0)
        return {
            "head": self.head,
            "error": self.error,
            "tokens": len(self.dense),
            "dense": _deflated(np.sqrt(self.dense) * 255),
            "pruned": _deflated(np.sqrt(self.pruned) * 255),
            "difference": _deflated(scaled * 127 + 128),
            "largest_difference": largest,
        }


def inflated(text: str) -> str:
    """Inflate a matrix that ``encode`` deflated: its plain bytes, in base64."""
    return base64.b64encode(zlib.decompress(base64.b64decode(text))).decode("ascii")


@torch.no_grad()
def attention_maps(dense: AttentionCall, pruned: AttentionCall) -> list[AttentionMap]:
    """Map the head with the largest error and the median one; one map if they coincide.

    :param dense: call for one sample
    :param pruned: call for the same sample
    """
    before, after = (first_rows(call, TOKENS)[0] for call in (dense, pruned))
    errors = (after - before).square().sum((-2, -1)) / before.square().sum((-2, -1))
    order = errors.argsort(descending=True).tolist()
    shown = before.shape[1]
    found = []
    for head in dict.fromkeys((order[0], order[len(order) // 2])):
        a, b = (x[head, :, :shown].cpu().numpy() for x in (before, after))
        found.append(AttentionMap(head, errors[head].item(), a, b, b - a))
    return found


def heads_of(call: AttentionCall) -> dict[str, int]:
    """Return how many heads divide the rows of q, k and v, and the columns of o."""
    heads, groups = call.query.shape[1], call.key.shape[1]
    return {"q": heads, "k": groups, "v": groups, "o": heads}


def zeros_by_head(role: str, kept: Tensor, heads: int) -> list[float]:
    """Return the share of pruned entries per head.

    :param kept: bool [rows, columns]; heads divide the columns of o, and the rows of
        the others
    """
    by_head = (kept.T if role == "o" else kept).unflatten(0, (heads, -1))
    return (~by_head).float().mean((1, 2)).tolist()


def _deflated(values: np.ndarray) -> str:
    whole = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return base64.b64encode(zlib.compress(whole.tobytes(), 9)).decode("ascii")
