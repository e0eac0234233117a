"""What the processes (ranks) of one run do together, each on its share of the samples.

Every rank sees the same sums and so takes the same decisions. What one process would
have added up over all samples is added up in float64 first, where the order of the
terms does not show in a result that is rounded to float32 afterwards: the result is
that of one process. In a run of one process nothing here communicates.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from compressed_tensors.offload import get_execution_device, update_offload_parameter
from compressed_tensors.offload.cache import OffloadCache
from torch import Tensor, nn

_SOURCE = 0  # as compressed-tensors': the rank that writes
# for what one rank does alone, such as saving; a rank that dies ends the run at once
_TIMEOUT = timedelta(hours=1)
_COMPARED = 8  # samples of each rank, to find out whether they are the same
_REPORTED = "llmc_attnmask/reported"
_store: dist.Store | None = None  # of the group; outlives it

Value = TypeVar("Value")


class IdenticalDataError(ValueError):
    """Several ranks calibrate on the same samples."""


class LostRankError(OSError):
    """Another rank has ended in the middle of the run."""


def world_size() -> int:
    """Ranks of this run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else _SOURCE


def is_source() -> bool:
    """Whether this rank is the one that writes."""
    return rank() == _SOURCE


def owner(position: int) -> int:
    """The rank that does the ``position``-th of several like pieces of work."""
    return position % world_size()


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def gathered(value: Value) -> list[Value]:
    """Every rank's value, by rank; anything that can be pickled."""
    if world_size() == 1:
        return [value]
    values: list[Value | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def all_sum(terms: Sequence[Tensor]) -> list[Tensor]:
    """Sums over the ranks.

    :param terms: float64, of the same shapes on every rank; used up
    :return: float64, on the terms' devices, the same bits on every rank
    """
    if world_size() == 1 or not terms:
        return list(terms)
    # at once: many small messages would wait for each other
    flat = _sendable(torch.cat([term.flatten() for term in terms]))
    dist.all_reduce(flat)
    parts = flat.split([term.numel() for term in terms])
    return [
        part.view(term.shape).to(term.device)
        for part, term in zip(parts, terms, strict=True)
    ]


def all_sum_numbers(*numbers: float) -> list[float]:
    """Sums of numbers over the ranks, in float64."""
    if world_size() == 1:
        return list(numbers)
    return all_sum([torch.tensor(numbers, dtype=torch.float64)])[0].tolist()


def send_from(source: int, tensor: Tensor) -> Tensor:
    """The tensor that rank ``source`` has, on every rank.

    :param tensor: elsewhere one of the same shape and dtype
    """
    if world_size() == 1:
        return tensor
    sent = _sendable(tensor).clone(memory_format=torch.contiguous_format)
    bits = sent.view(torch.uint8) if sent.dtype == torch.bool else sent
    dist.broadcast(bits, source)
    return sent.to(tensor.device)


def write_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Overwrite a parameter, offloaded or not, by the source's value on every rank.

    Memory and files that the ranks share are written by the source alone, while nobody
    reads them.
    """
    if world_size() == 1:
        update_offload_parameter(module, name, value)
        return
    value = send_from(_SOURCE, value)
    dist.barrier()
    cache = module._parameters
    kept = cache.offload_device if isinstance(cache, OffloadCache) else None
    shared = kept == "disk" or (kept is not None and torch.device(kept).type == "cpu")
    if is_source() or not shared:
        update_offload_parameter(module, name, value)
    elif torch.device(get_execution_device(module)) != kept:
        # this rank's own copy, if one is kept
        with torch.no_grad():
            getattr(module, name).data.copy_(value)
    dist.barrier()


def reached(layers: Iterable[str]) -> list[str]:
    """The layers that samples have reached, which must be the same on every rank.

    :param layers: those that this rank's samples have reached
    :raises ValueError: on every rank, if they are not
    """
    shares = gathered(list(layers))
    for r, share in enumerate(shares):
        if missed := [name for name in shares[0] if name not in share]:
            raise ValueError(
                f"no calibration sample of rank {r} reached {missed[0]}, but some of "
                "rank 0 did; mix the samples so that every rank has some of every kind"
            )
        if more := [name for name in share if name not in shares[0]]:
            raise ValueError(
                f"no calibration sample of rank 0 reached {more[0]}, but some of rank "
                f"{r} did; mix the samples so that every rank has some of every kind"
            )
    return shares[0]


def check_shares(traces: Iterable[Tensor]) -> None:
    """Refuse ranks that calibrate on the same samples as another.

    :param traces: what this rank's samples have left in the model; the first count
    :raises IdenticalDataError: on every rank, if two ranks have the same
    """
    if world_size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in itertools.islice(traces, _COMPARED):
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    digests = gathered(digest.digest())
    for second, found in enumerate(digests):
        earlier = digests.index(found)
        if earlier != second:
            raise IdenticalDataError(
                f"ranks {earlier} and {second} calibrate on the same samples: "
                "llm-compressor hands every rank the same part of a dataset that is "
                "the same everywhere. Give each rank a dataset of its own, as "
                "`llmc-attnmask prune` does, for example "
                "dataset.shard(dist.get_world_size(), dist.get_rank())"
            )


@contextmanager
def process_group() -> Iterator[None]:
    """Within, the processes that torchrun has started are one group.

    One that exists already is used as it is. NCCL between GPUs, gloo between CPUs.

    :raises LostRankError: if another rank has ended meanwhile
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    global _store
    _store, own, size = next(dist.rendezvous("env://"))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, store=_store, rank=own, world_size=size, timeout=_TIMEOUT
    )
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            raise LostRankError(
                f"rank {own} of {size} has lost another one, which ended without a "
                "message of its own: it was killed, perhaps for lack of memory; "
                "torchrun's summary names the signal"
            ) from error
        raise
    dist.destroy_process_group()


def first_to_report() -> bool:
    """Whether this rank is the first to say why the run ends; one message is enough."""
    if _store is None:
        return True
    try:
        return _store.add(_REPORTED, 1) == 1
    except RuntimeError:  # gone, with the process that kept it
        return True


def _sendable(tensor: Tensor) -> Tensor:
    """Where the group's backend takes it: NCCL alone knows no CPU."""
    if tensor.is_cuda or "cpu:" in dist.get_backend_config():
        return tensor
    return tensor.to(torch.device("cuda", torch.cuda.current_device()))
