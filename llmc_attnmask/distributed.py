"""Communication between the processes (ranks) of one run.

Each rank has its share of the samples. Every rank sees the same sums and so makes the
same decisions. Sums over all samples are added up in float64 and then rounded to
float32, where the order of the terms no longer shows, so the result equals that of one
process. In a run of one process, nothing here communicates.
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

_SOURCE = 0  # the rank that writes, as in compressed-tensors
# for work that one rank does alone, such as saving; a dead rank ends the run at once
_TIMEOUT = timedelta(hours=1)
_COMPARED = 8  # samples of each rank, to detect ranks with the same data
_REPORTED = "llmc_attnmask/reported"
_store: dist.Store | None = None  # of the process group, which it outlives

Value = TypeVar("Value")


class IdenticalDataError(ValueError):
    """Several ranks calibrate on the same samples."""


class LostRankError(OSError):
    """Another rank ended in the middle of the run."""


def world_size() -> int:
    """Return the number of ranks in this run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else _SOURCE


def is_source() -> bool:
    """Return whether this rank is the one that writes."""
    return rank() == _SOURCE


def owner(position: int) -> int:
    """Return the rank that does piece ``position`` of several similar pieces."""
    return position % world_size()


def barrier() -> None:
    """Wait until all ranks have called this."""
    if world_size() > 1:
        dist.barrier()


def gathered(value: Value) -> list[Value]:
    """Collect every rank's value, by rank; a value is anything that can be pickled."""
    if world_size() == 1:
        return [value]
    values: list[Value | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def all_sum(terms: Sequence[Tensor]) -> list[Tensor]:
    """Sum tensors over the ranks.

    :param terms: float64, of the same shapes on every rank; may be overwritten
    :return: float64, on the terms' devices, the same bits on every rank
    """
    if world_size() == 1 or not terms:
        return list(terms)
    # in one message, because many small ones would wait for each other
    flat = _sendable(torch.cat([term.flatten() for term in terms]))
    dist.all_reduce(flat)
    parts = flat.split([term.numel() for term in terms])
    return [
        part.view(term.shape).to(term.device)
        for part, term in zip(parts, terms, strict=True)
    ]


def all_sum_numbers(*numbers: float) -> list[float]:
    """Sum numbers over the ranks, in float64."""
    if world_size() == 1:
        return list(numbers)
    return all_sum([torch.tensor(numbers, dtype=torch.float64)])[0].tolist()


def send_from(source: int, tensor: Tensor) -> Tensor:
    """Send rank ``source``'s tensor to every rank.

    :param tensor: on other ranks, any tensor of the same shape and dtype
    """
    if world_size() == 1:
        return tensor
    sent = _sendable(tensor).clone(memory_format=torch.contiguous_format)
    bits = sent.view(torch.uint8) if sent.dtype == torch.bool else sent
    dist.broadcast(bits, source)
    return sent.to(tensor.device)


def write_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Overwrite a parameter, offloaded or not, with the source's value on every rank.

    Only the source writes memory and files that the ranks share, while no rank reads
    them.
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
        # this rank's own copy, if it keeps one
        with torch.no_grad():
            getattr(module, name).data.copy_(value)
    dist.barrier()


def reached(layers: Iterable[str]) -> list[str]:
    """Return the layers that samples reached, which must be the same on every rank.

    :param layers: those that this rank's samples reached
    :raises ValueError: on every rank, if they are not the same
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
    """Refuse ranks that calibrate on the same samples.

    :param traces: what this rank's samples left behind, such as a layer's inputs; the
        first few are compared
    :raises IdenticalDataError: on every rank, if two ranks have the same ones
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
                "llm-compressor gives every rank the same part of a dataset that is "
                "the same everywhere. Give each rank a dataset of its own, as "
                "`llmc-attnmask prune` does, for example "
                "dataset.shard(dist.get_world_size(), dist.get_rank())"
            )


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started into one group, within the block.

    An existing group is used as it is. GPUs communicate with NCCL, CPUs with gloo.

    :raises LostRankError: if another rank ended within the block
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
                f"rank {own} of {size} lost another rank, which ended without a "
                "message: it was killed, perhaps because memory ran out; "
                "torchrun's summary names the signal"
            ) from error
        raise
    dist.destroy_process_group()


def first_to_report() -> bool:
    """Return whether this rank is the first to report why the run ends.

    The others stay silent.
    """
    if _store is None:
        return True
    try:
        return _store.add(_REPORTED, 1) == 1
    except RuntimeError:  # the store is gone, with the process that hosted it
        return True


def _sendable(tensor: Tensor) -> Tensor:
    """Move a tensor to a device that the backend accepts: for NCCL, not the CPU."""
    if tensor.is_cuda or "cpu:" in dist.get_backend_config():
        return tensor
    return tensor.to(torch.device("cuda", torch.cuda.current_device()))
