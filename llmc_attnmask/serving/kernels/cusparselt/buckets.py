"""The numbers of tokens that have a plan; others are padded to the next one."""

import bisect

# (up to, in steps of): every step is a multiple of what the library takes in any type.
# Steps are small where CUDA graphs of few tokens are recorded, for multiples of 8 and
# 16; later they are at most the 128 tokens of a tile, to which the kernels pad anyway.
_STEPS = ((256, 16), (1024, 64))
_LAST_STEP = 128
# The buckets with a search of their own. More than 2048 tokens fill the GPU in the same
# way, and the search's tensors must fit into memory next to the model.
_SEARCHED = (32, 128, 512, 2048)


def buckets(fewest: int, largest: int) -> list[int]:
    """Return the buckets' numbers of tokens, ascending.

    :param fewest: fewer tokens need no bucket of their own
    :param largest: the last bucket is this, rounded up to a multiple of 16
    :raises ValueError: unless 1 <= fewest <= largest
    """
    if not 1 <= fewest <= largest:
        raise ValueError(
            f"plans for {fewest} to {largest} tokens: expected 1 <= fewest <= largest"
        )
    last = -(-largest // 16) * 16
    found = []
    tokens = 0
    while tokens < last:
        step = next((s for up_to, s in _STEPS if tokens < up_to), _LAST_STEP)
        tokens = min(tokens + step, last)
        if tokens >= fewest:
            found.append(tokens)
    return found


def fitting(ascending: list[int], tokens: int) -> int:
    """Return the smallest bucket that fits the tokens, at most the last one's."""
    return ascending[bisect.bisect_left(ascending, tokens)]


def representatives(ascending: list[int]) -> list[int]:
    """Return the buckets to search for, descending, as long prompts matter most."""
    chosen = {nearest(ascending, tokens) for tokens in _SEARCHED}
    return sorted(chosen, reverse=True)


def nearest(choices: list[int], tokens: int) -> int:
    """Return the choice whose ratio to ``tokens`` is closest to 1."""
    return min(choices, key=lambda other: max(other, tokens) / min(other, tokens))
