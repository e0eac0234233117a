"""Split calibration samples into micro-batches, order them, and sum over them.

A micro-batch is a few samples of one length that are always evaluated together, so that
their results have the same bits however many processes share the samples. Micro-batches
are numbered across all processes and dealt to the ranks in turn.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Generic, TypeVar

import torch
from torch import Tensor

from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.distributed import all_sum, gathered, rank, world_size

# With fewer tokens, a GPU and a CPU's threads are idle; with more, a mini-batch has too
# few micro-batches for every rank to get one.
_TOKENS_AT_ONCE = 2048
_MIN_MICRO_BATCHES = 8  # if there are as many samples
MAX_MICRO_BATCH = 8  # samples
_VALIDATION_ONE_IN = 8  # micro-batches: they select the best mask, and do not train it

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class MicroBatch:
    """A few calibration samples of one length."""

    index: int  # among the micro-batches of all ranks
    size: int  # number of samples
    # indices among this rank's samples; empty if another rank has them
    samples: tuple[int, ...]


def micro_batch_size(total: int, length: int) -> int:
    """Return how many samples a micro-batch has, a power of two.

    :param total: number of samples of all ranks
    :param length: tokens per sample
    """
    most = min(
        MAX_MICRO_BATCH,
        _TOKENS_AT_ONCE // max(1, length),
        total // _MIN_MICRO_BATCHES,
    )
    return 1 << (max(1, most).bit_length() - 1)


def share(total: int, length: int, rank: int, world: int) -> list[int]:
    """Return the indices of a rank's samples: whole micro-batches, dealt in turn.

    :param total: number of samples of all ranks
    :param length: tokens per sample, the same for all
    :raises ValueError: if there are too few samples for every rank to get some
    """
    size = micro_batch_size(total, length)
    if total <= (world - 1) * size:
        raise ValueError(
            f"{total} calibration samples of {length} tokens, evaluated {size} at "
            f"once, are too few for {world} processes; give at least "
            f"{(world - 1) * size + 1} or start fewer processes"
        )
    return [sample for sample in range(total) if sample // size % world == rank]


def micro_batches_of(
    inputs: ModuleInputs, batch_size: int = MAX_MICRO_BATCH
) -> list[MicroBatch]:
    """Split the samples of all ranks into micro-batches, in one order on all ranks.

    :param inputs: this rank's samples
    :param batch_size: samples per step of a descent; the micro-batches' size divides it
    """
    mine = range(len(inputs))
    longest = max((inputs.hidden.shape(sample)[1] for sample in mine), default=1)
    shares = gathered((len(inputs), longest))
    total, longest = sum(n for n, _ in shares), max(n for _, n in shares)
    chunk = micro_batch_size(total, longest)
    size = math.gcd(chunk, batch_size)  # of the parts into which chunks are split
    chunks = [
        [samples[i : i + size] for i in range(0, len(samples), size)]
        for samples in inputs.batches(mine, chunk)
    ]
    by_rank = gathered([[len(part) for part in parts] for parts in chunks])
    micro_batches: list[MicroBatch] = []
    for position in range(max(map(len, by_rank))):
        for r, sizes in enumerate(by_rank):
            parts = sizes[position] if position < len(sizes) else []
            for part, size in enumerate(parts):
                own = chunks[position][part] if r == rank() else []
                micro_batches.append(MicroBatch(len(micro_batches), size, tuple(own)))
    return micro_batches


def train_validation_split(
    micro_batches: Sequence[MicroBatch],
) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """Split off the validation set; if there are too few, all are in both sets."""

    def validates(m: MicroBatch) -> bool:
        # along a diagonal, so that every rank has some
        block, position = divmod(m.index, _VALIDATION_ONE_IN)
        return position == _VALIDATION_ONE_IN - 1 - block % _VALIDATION_ONE_IN

    validation = [m for m in micro_batches if validates(m)]
    if not validation:
        return list(micro_batches), list(micro_batches)
    return [m for m in micro_batches if not validates(m)], validation


def minibatches(
    micro_batches: Sequence[MicroBatch], batch_size: int, generator: torch.Generator
) -> Iterator[list[MicroBatch]]:
    """Yield mini-batches of about ``batch_size`` samples endlessly, shuffled by epoch.

    Each takes its micro-batches from different residue classes of their index, so that
    ranks have equal shares of it.
    """
    number = max(1, batch_size // max(m.size for m in micro_batches))
    classes = [
        [m for m in micro_batches if m.index % number == c] for c in range(number)
    ]
    while True:
        shuffled = [
            [members[i] for i in torch.randperm(len(members), generator=generator)]
            for members in classes
        ]
        for batch in zip_longest(*shuffled):
            yield [m for m in batch if m is not None]


def sample_count(micro_batches: Iterable[MicroBatch]) -> int:
    """Return how many samples some micro-batches have, on all ranks together."""
    return sum(m.size for m in micro_batches)


class Sums(Generic[Key]):
    """Sums of tensors over the micro-batches of all ranks, the same in any order.

    They are summed in float64. A single term stays in its own precision, which gives an
    equal sum and costs nothing.

    :param like: tensors whose sums start at zero, for ranks that may have no term
    """

    def __init__(self, like: Mapping[Key, Tensor] | None = None):
        self._like = dict(like or {})
        self._sums: dict[Key, Tensor] = {}
        self._several: set[Key] = set()  # of more than one term, in float64

    def add(self, key: Key, term: Tensor) -> None:
        """Add the term of one micro-batch, or of a part of one."""
        if key in self._several:
            self._sums[key] += term
        elif key in self._sums:
            self._sums[key] = self._sums[key].double() + term
            self._several.add(key)
        else:
            self._sums[key] = term

    def own(self, key: Key) -> Tensor:
        """Return this rank's sum so far, float64."""
        return self._sums[key].double()

    def totals(self) -> dict[Key, Tensor]:
        """Return the sums over all ranks, float32; all must have the same keys."""
        for key in self._like.keys() - self._sums.keys():
            self._sums[key] = torch.zeros_like(self._like[key])
        keys = dict.fromkeys((*self._like, *self._sums))  # in one order on all ranks
        sums = {key: self._sums[key] for key in keys}
        if world_size() > 1:
            terms = [found.double() for found in sums.values()]
            sums = dict(zip(sums, all_sum(terms), strict=True))
        return {key: found.float() for key, found in sums.items()}
