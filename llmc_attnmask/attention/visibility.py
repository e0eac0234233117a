"""Find which keys a block of query rows can see; masks hide the others."""

import torch
from torch import Tensor

from llmc_attnmask.attention.capture import AttentionCall

# Masks hide a key with the lowest number of the model's dtype, -65504 for fp16. In a
# row with a visible key, the softmax of any logit below this is exactly zero in fp32.
_HIDDEN = -1e4
_ELEMENTS_AT_ONCE = 2**22


def key_ranges(call: AttentionCall, rows_at_once: int) -> Tensor:
    """Return the first visible key and the one after the last, per block of query rows.

    :return: int64 [blocks, 2], on the call's device
    """
    length, keys = call.query.shape[2], call.key.shape[2]
    blocks = -(-length // rows_at_once)
    if call.mask is None:
        return torch.tensor([[0, keys]], device=call.query.device).expand(blocks, 2)
    if call.mask.shape[-2] == 1:  # how a bidirectional model hides padding
        return _ranges(call.mask, 1).expand(blocks, 2)
    # a few blocks at a time, so that memory does not grow with L^2
    step = max(1, _ELEMENTS_AT_ONCE // (call.mask[..., :1, :].numel() * rows_at_once))
    step *= rows_at_once
    return torch.cat(
        [
            _ranges(call.mask[..., start : start + step, :], rows_at_once)
            for start in range(0, length, step)
        ]
    )


def _ranges(mask: Tensor, rows_at_once: int) -> Tensor:
    visible = mask > _HIDDEN
    # a row that sees no key attends to all keys evenly
    visible = visible | ~visible.any(-1, keepdim=True)
    by_row = visible.flatten(0, -3).any(0)
    rest = -len(by_row) % rows_at_once
    by_row = torch.nn.functional.pad(by_row, (0, 0, 0, rest))
    by_block = by_row.unflatten(0, (-1, rows_at_once)).any(1).to(torch.uint8)
    first = by_block.argmax(-1)
    end = by_block.shape[-1] - by_block.flip(-1).argmax(-1)
    return torch.stack([first, end], dim=-1)
