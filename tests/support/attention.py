"""The attention matrices of a small call, all at once."""

from torch import Tensor

from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.matrix import first_rows


def probabilities(call: AttentionCall) -> Tensor:
    """Return [B, H, L, L], whose rows sum to 1 (less what the sinks take)."""
    return first_rows(call, call.query.shape[2])
