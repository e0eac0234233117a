"""Split evaluation windows into batches of a bounded number of tokens."""

from torch import Tensor

_TOKENS_AT_ONCE = 8192


def batches(windows: Tensor) -> tuple[Tensor, ...]:
    """Return the windows in order, as views of as many as a model evaluates at once.

    :param windows: int64 [windows, length]
    """
    return windows.split(max(1, _TOKENS_AT_ONCE // windows.shape[1]))
