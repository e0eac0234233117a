"""Detect a weight's mask from its exact zeros."""

from torch import Tensor

_SAMPLED_ROWS, _SAMPLED_COLUMNS = 64, 512
_SHARE = 0.25  # of zeros; trained dense weights have next to none
_DISTINCT = (
    0.25  # magnitudes per survivor; rounding to 2 to 4 bits leaves few per group
)


def detect_mask(weight: Tensor) -> Tensor | None:
    """Return the mask of an already pruned weight; None if the weight is dense.

    The mask keeps the nonzero entries.

    A weight is 2:4 if every group of four inputs has two zeros. Without a pattern, a
    weight counts as pruned if a quarter of it is zero and its other values do not look
    like a dense weight rounded to a few levels, which produces many zeros, too.

    :param weight: [rows, columns], floating point
    :return: bool [rows, columns], True where an entry survives
    """
    every = -(-weight.shape[0] // _SAMPLED_ROWS)
    sample = weight.detach()[::every]
    if _is_2of4(sample):
        found = _is_2of4(weight.detach())
    else:
        found = _unrounded_zeros(sample[:, :_SAMPLED_COLUMNS])
    return weight.detach() != 0 if found else None


def _is_2of4(weight: Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    zeros = (weight == 0).view(len(weight), -1, 4).sum(-1)
    # a weight that is zero throughout was initialized to zero, not pruned
    return bool((zeros >= 2).all()) and not bool((zeros == 4).all())


def _unrounded_zeros(rows: Tensor) -> bool:
    nonzero = int((rows != 0).sum())
    if not nonzero or nonzero > (1 - _SHARE) * rows.numel():
        return False
    magnitudes = rows.abs().float().sort(dim=1).values
    distinct = int((magnitudes.diff(dim=1) > 0).sum())
    return distinct > _DISTINCT * nonzero
