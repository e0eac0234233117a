"""Check that the attention A V reaches o_proj unchanged.

The attention output A V W_o assumes this. BitNet has a norm in between, AFMoE has a
gate, and DiffLlama takes the difference of two attentions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmc_attnmask.attention.capture import AttentionReplica, UnsupportedAttentionError
from llmc_attnmask.attention.matrix import attention_context

_TOLERANCE = 1e-2  # of the norm; a norm or a gate changes much more


@torch.no_grad()
def check_output_path(
    replica: AttentionReplica, args: Sequence[Any], kwargs: Mapping[str, Any], o: str
) -> None:
    """Compare A V with what the module's own attention passes to o.

    :param args: positional arguments of the module's forward
    :param kwargs: its keyword arguments
    :param o: name of o's Linear within the module
    :raises UnsupportedAttentionError: if they differ
    """
    call = replica(args, kwargs)
    found = attention_context(call, call.value)
    read = replica.read_by(o, args, kwargs)
    same = read.shape == found.shape
    if same and (found - read).norm() <= _TOLERANCE * read.norm():
        return
    raise UnsupportedAttentionError(
        f"{type(replica.module).__name__} changes the attention output before {o} "
        "reads it (a norm, a gate, a second attention?), so the effect of a pruned "
        "matrix on the output is unknown; prune only q and k, with output_weight: 0"
    )
