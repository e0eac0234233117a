"""Find by probing where a library keeps the indices of a 2:4 weight.

It compresses weights in which every group of four keeps entries 0 and 1, or 2 and 3,
depending on one bit of the group's number. The bits of the compressed form that change
accordingly spell the number of the group that they belong to.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
Compress = Callable[[Tensor], Tensor]
Bits = NDArray[np.uint8]


def of(
    compress: Compress, dtype: torch.dtype, rows: int, columns: int, device: str
) -> dict[str, Any]:
    """Return the layout of everything after the kept values.

    :param compress: compresses a weight [rows, columns]; kept values come first
    :return: ``groups``: for every four bits of the metadata, the number of their group,
        row * columns / 4 + group, or -1 for bits of no group; ``codes``:
        the four bits by the kept pair; ``regular``: whether all four bits of a nibble
        belong to one group, and every group has one nibble; ``metadata_bytes``
    """
    count = rows * columns // 4
    numbers = np.arange(count)

    def bits(second: NDArray[np.bool_]) -> Bits:
        return _metadata(compress, _weight(second, dtype, rows, columns, device))

    none = bits(np.zeros(count, dtype=bool))
    live = none != bits(np.ones(count, dtype=bool))
    spelled = np.zeros(none.size, dtype=np.int64)
    for bit in range(max(1, (count - 1).bit_length())):
        changed = none != bits((numbers >> bit & 1).astype(bool))
        spelled |= changed.astype(np.int64) << bit
    spelled[~live] = -1
    by_nibble = spelled[: spelled.size // 4 * 4].reshape(-1, 4)
    groups = by_nibble.max(axis=1)
    of_one = ((by_nibble == groups[:, None]) | (by_nibble == -1)).all()
    each_once = np.array_equal(np.sort(groups[groups >= 0]), numbers)
    used = int(np.flatnonzero(groups >= 0)[0]) if (groups >= 0).any() else 0
    codes = {}
    for pair in PAIRS:
        found = _metadata(compress, _kept(pair, dtype, rows, columns, device))
        nibble = found[4 * used : 4 * used + 4]
        codes[f"{pair[0]}{pair[1]}"] = int(
            sum(int(b) << i for i, b in enumerate(nibble))
        )
    return {
        "regular": bool(of_one and each_once),
        "metadata_bytes": none.size // 8,
        "codes": codes,
        "groups": groups.tolist(),
    }


def _weight(
    second: NDArray[np.bool_], dtype: torch.dtype, rows: int, columns: int, device: str
) -> Tensor:
    """Return a weight with ones at entries 0 and 1 of a group, or at 2 and 3."""
    chosen = torch.from_numpy(second).view(rows, columns // 4, 1)
    last = torch.tensor([False, False, True, True])
    return (chosen == last).view(rows, columns).to(device).float().to(dtype)


def _kept(
    pair: tuple[int, int], dtype: torch.dtype, rows: int, columns: int, device: str
) -> Tensor:
    group = torch.zeros(4)
    group[list(pair)] = 1
    return group.repeat(rows, columns // 4).to(device).to(dtype)


def _metadata(compress: Compress, weight: Tensor) -> Bits:
    """Return the bits after the kept values, the lowest of a byte first."""
    stored = compress(weight).contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return np.unpackbits(stored[weight.nbytes // 2 :], bitorder="little")
