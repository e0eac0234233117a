"""Convert a checkpoint from one storage to the other, bit by bit.

Shards are converted one by one, a few megabytes at a time. Files without weights are
copied.
"""

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import methodcaller
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.checkpoint.config import (
    PackedStorage,
    dense_config,
    packed_config,
    packed_storage,
)
from llmc_attnmask.checkpoint.io.atomic import check_new, new_folder
from llmc_attnmask.checkpoint.io.files import (
    CONFIG,
    INDEX,
    Checkpoint,
    TensorSpec,
    open_checkpoint,
)
from llmc_attnmask.checkpoint.io.folders import check_apart, copy_others
from llmc_attnmask.checkpoint.io.threads import in_threads
from llmc_attnmask.checkpoint.io.writer import ShardWriter
from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask, sparse_bitmask
from llmc_attnmask.checkpoint.selection import (
    CheckpointWarning,
    packed_layers,
    structure,
    to_pack,
    two_of_four_layers,
)
from llmc_attnmask.checkpoint.transfers.base import Copy, Transfer, Unpack


@dataclass(frozen=True)
class Conversion:
    """What ``to_packed`` or ``to_dense`` did."""

    output: str
    layers: list[str]  # modules whose storage changed
    bytes_before: int  # of all tensors
    bytes_after: int


def to_packed(
    directory: str | Path,
    output: str | Path,
    *,
    storage: PackedStorage = "sparse-24-bitmask",
    only_2of4: bool = False,
) -> Conversion:
    """Pack weights and config; ``report.conversion.pack`` documents the arguments."""
    check_new(Path(output))
    check_apart(Path(directory), Path(output))
    if storage not in get_args(PackedStorage):
        raise ValueError(
            f"storage is {storage!r}; expected {' or '.join(get_args(PackedStorage))}"
        )
    if only_2of4 and storage != sparse_24_bitmask.NAME:
        raise ValueError(
            f"--only-2of4 chooses layers for {sparse_24_bitmask.NAME}; {storage} packs "
            "every sparse layer, so leave it out"
        )
    checkpoint = open_checkpoint(directory)
    if packed_storage(checkpoint.config):
        raise ValueError(
            f"{directory} is already packed; `unpack` stores it dense again"
        )
    packs = to_pack(checkpoint, storage, only_2of4)
    zeros = sum(pack.zeros for pack in packs)
    entries = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    layers = [pack.module for pack in packs]
    config = dict(checkpoint.config)
    if storage == sparse_bitmask.NAME and marker.read(config) is None:
        weights = {pack.module: pack.tensor for pack in packs}
        named = two_of_four_layers(weights)
        marker.write(config, named, [x for x in layers if x not in set(named)])
    config = packed_config(config, storage, layers, round(zeros / entries, 6))
    by_weight: dict[str, Transfer] = {pack.tensor.name: pack for pack in packs}
    transfers = {
        shard: [by_weight.get(t.name) or Copy(t) for t in tensors]
        for shard, tensors in checkpoint.shards.items()
    }
    return _convert(checkpoint, Path(output), config, layers, transfers)


def to_dense(directory: str | Path, output: str | Path) -> Conversion:
    """Unpack weights and config; ``report.conversion.unpack`` documents the arguments.

    The marker in the config names the layers.
    """
    check_new(Path(output))
    check_apart(Path(directory), Path(output))
    checkpoint = open_checkpoint(directory)
    packed = packed_layers(checkpoint)
    starts: dict[str, Transfer] = {u.parts["compressed"].name: u for u in packed}
    parts = {t.name for u in packed for t in u.parts.values()}
    transfers = {
        shard: [
            starts.get(t.name) or Copy(t)
            for t in tensors
            if t.name in starts or t.name not in parts
        ]
        for shard, tensors in checkpoint.shards.items()
    }
    layers = [u.module for u in packed]
    config = dense_config(checkpoint.config, *_structures(checkpoint.config, packed))
    return _convert(checkpoint, Path(output), config, layers, transfers)


def _structures(
    config: Mapping[str, Any], packed: Sequence[Unpack]
) -> tuple[list[str], list[str]]:
    """Return the names of 2:4 and of unstructured layers that the marker will have."""
    named, unstructured = marker.read(config) or [], marker.read_unstructured(config)
    known = {*named, *unstructured}
    unknown = []
    for layer in packed:
        if layer.storage == sparse_24_bitmask.NAME:
            named.append(layer.module)
        elif layer.module not in known:
            unknown.append(layer)
    # of another origin, which may have packed whatever has a weight
    for layer, found in zip(unknown, in_threads(structure, unknown), strict=True):
        if found == marker.STRUCTURE:
            named.append(layer.module)
        elif found == marker.UNSTRUCTURED:
            unstructured.append(layer.module)
    return named, unstructured


def _convert(
    checkpoint: Checkpoint,
    output: Path,
    config: dict[str, Any],
    layers: Sequence[str],
    transfers: dict[str, list[Transfer]],
) -> Conversion:
    """Write the new checkpoint.

    :param transfers: by shard; a shard without any is not written
    """
    transfers = {shard: jobs for shard, jobs in transfers.items() if jobs}
    outputs = {
        shard: [spec for job in jobs for spec in job.outputs]
        for shard, jobs in transfers.items()
    }
    _check_names(checkpoint, outputs)
    size = sum(spec.bytes for specs in outputs.values() for spec in specs)
    with new_folder(output) as partial:
        if pickled := copy_others(checkpoint, partial):
            warnings.warn(
                f"left out: {', '.join(pickled)}; pickled files may run code when they "
                "are opened",
                CheckpointWarning,
                stacklevel=3,
            )
        count = len(checkpoint.tensors)
        with tqdm(total=count, desc="writing", leave=False) as progress:
            for shard, jobs in transfers.items():
                target = partial / shard
                target.parent.mkdir(parents=True, exist_ok=True)
                metadata = checkpoint.metadata[shard]
                with ShardWriter(target, outputs[shard], metadata) as writer:
                    for _ in in_threads(methodcaller("write", writer), jobs):
                        progress.update()
        if checkpoint.index is not None:
            index = dict(checkpoint.index)
            index["metadata"] = {**index["metadata"], "total_size": size}
            index["weight_map"] = {
                spec.name: shard for shard, specs in outputs.items() for spec in specs
            }
            write_json(partial / INDEX, index)
        write_json(partial / CONFIG, config)
    before = sum(tensor.bytes for tensor in checkpoint.tensors.values())
    return Conversion(str(output), list(layers), before, size)


def _check_names(checkpoint: Checkpoint, outputs: dict[str, list[TensorSpec]]) -> None:
    """Refuse a checkpoint that has a layer in both storages."""
    count = Counter(spec.name for specs in outputs.values() for spec in specs)
    if twice := [name for name, times in count.items() if times > 1]:
        module = twice[0].rpartition(".")[0]
        raise ValueError(
            f"{checkpoint.directory} has {module} stored both dense and packed; remove "
            "the tensors of one of the two"
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
