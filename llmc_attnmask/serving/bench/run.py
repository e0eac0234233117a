"""Time every kind of layer of a checkpoint, dense and sparse, on this machine."""

import gc
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import nn
from tqdm import tqdm
from vllm.platforms import current_platform

from llmc_attnmask.checkpoint.io.files import open_checkpoint
from llmc_attnmask.serving.bench import layers
from llmc_attnmask.serving.bench.groups import groups
from llmc_attnmask.serving.bench.result import Bench, Kind, Time
from llmc_attnmask.serving.timing import Timer

TOKENS = (1, 8, 64, 512)  # in one step
PROMPT = 512  # tokens of a prompt, of which only the last one needs an output
SECONDS = 15.0  # of timing, without loading; more if there are many kinds of layers


def bench(directory: str | Path) -> Bench:
    """Time the layers of a sparse checkpoint with this package's kernels and without.

    One layer of every kind is loaded as vLLM loads it, on this machine and in this
    process, and timed in turn with the kernels that vLLM would use if it were not
    sparse. Attention, norms and communication are not part of it.

    :param directory: checkpoint folder that ``vllm serve`` could serve
    :raises ValueError: if config.json names no sparse layers, or files do not fit
        together
    """
    directory = Path(directory)
    checkpoint = open_checkpoint(directory)
    with layers.single_process(directory) as config, torch.inference_mode():
        found, experts = groups(checkpoint, config.quant_config.sparsity)
        timer = Timer(config.device_config.device_type)
        seconds = SECONDS / len(TOKENS) / (len(found) + 1)
        kinds, rivals = [], set()
        for group in tqdm(found, "timing layers", leave=False):
            dense, _ = layers.load(group, checkpoint, config, dense=True)
            sparse, row = layers.load(group, checkpoint, config, dense=False)
            rivals.add(_name(dense))
            size = layers.sparse_bytes(sparse)
            kinds.append(
                Kind(
                    layers=len(group.names),
                    name=group.kind,
                    rows=group.rows,
                    columns=group.columns,
                    zeros=group.zeros,
                    storage=row.storage if row else "dense",
                    kernel=row.kernel if row else "dense",
                    reason=row.reason if row else "not sparse",
                    dense_bytes=group.dense_bytes,
                    sparse_bytes=group.dense_bytes if size is None else size,
                    times=_times(timer, [dense, sparse], group.columns, seconds),
                )
            )
            del dense, sparse
            gc.collect()
        if (head := layers.load_head(checkpoint, config)) is not None:
            kinds.append(_head(timer, head, seconds))
        if not kinds:
            raise ValueError(
                f"{directory} has no Linear outside of experts that could be timed"
            )
        machine = _machine(config.device_config.device_type)
    return Bench(
        model=str(directory),
        machine=machine,
        vllm=vllm.__version__,
        rival=", ".join(sorted(rivals)),
        kinds=kinds,
        dense_bytes=sum(kind.layers * kind.dense_bytes for kind in kinds),
        sparse_bytes=sum(kind.layers * kind.sparse_bytes for kind in kinds),
        times=_summed(kinds),
        left_out=len(experts),
    )


def _head(timer: Timer, head: Any, seconds: float) -> Kind:
    rows, columns = head.weight.shape
    return Kind(
        layers=1,
        name="output layer",
        rows=rows,
        columns=columns,
        zeros=0.0,
        storage="dense",
        kernel="dense",
        reason="not sparse; of a prompt, it sees the last token alone",
        dense_bytes=head.weight.nbytes,
        sparse_bytes=head.weight.nbytes,
        times=_times(timer, [head], columns, seconds, output=True),
    )


def _times(
    timer: Timer,
    served: Sequence[Any],
    columns: int,
    seconds: float,
    output: bool = False,
) -> list[Time]:
    """Time layers, dense and sparse, or one that is always dense."""
    found = []
    for tokens in TOKENS:
        rows = 1 if output and tokens >= PROMPT else tokens
        x = torch.randn(rows, columns, device=timer.device)
        calls = [partial(layer.quant_method.apply, layer, x) for layer in served]
        times = timer.within(calls, seconds)
        found.append(Time(tokens, times[0], times[-1]))
    return found


def _summed(kinds: Sequence[Kind]) -> list[Time]:
    """Add up the times of all layers, by number of tokens."""
    return [
        Time(
            tokens,
            sum(kind.layers * kind.times[i].dense_ms for kind in kinds),
            sum(kind.layers * kind.times[i].sparse_ms for kind in kinds),
        )
        for i, tokens in enumerate(TOKENS)
    ]


def _name(layer: nn.Module) -> str:
    """Name what multiplies a layer in vLLM itself."""
    scheme = getattr(layer, "scheme", None)
    if scheme is None:
        return type(layer.quant_method).__name__
    kernel = getattr(scheme, "kernel", None)
    inner = "" if kernel is None else f" with {type(kernel).__name__}"
    return f"{type(scheme).__name__}{inner}"


def _machine(device: str) -> str:
    if device != "cpu":
        return str(current_platform.get_device_name())
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {torch.get_num_threads()} threads"
