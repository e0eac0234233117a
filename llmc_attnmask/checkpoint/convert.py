"""Convert a checkpoint from one storage to the other, bit by bit.

Shards are converted one by one, a few megabytes at a time. Files without weights are
copied.
"""

import json
import warnings
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from math import prod
from operator import methodcaller
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.checkpoint.config import dense_config, is_packed, packed_config
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
from llmc_attnmask.checkpoint.linears import (
    decoder_linears,
    mixed_groups,
    packed_integers,
)
from llmc_attnmask.checkpoint.transfer import (
    Copy,
    Pack,
    Transfer,
    Unpack,
    is_two_of_four,
    not_two_of_four,
    zeros_at_start,
)

SPARSE = 0.125  # share of zeros from which a layer counts as sparse


class CheckpointWarning(UserWarning):
    """Layers are not stored the way that was requested."""


class NothingToPackError(ValueError):
    """A checkpoint has no layer that can be packed."""


@dataclass(frozen=True)
class Conversion:
    """What ``to_packed`` or ``to_dense`` did."""

    output: str
    layers: list[str]  # modules whose storage changed
    bytes_before: int  # of all tensors
    bytes_after: int


def to_packed(
    directory: str | Path, output: str | Path, *, only_2of4: bool = False
) -> Conversion:
    """Pack weights and config; ``report.conversion.pack`` documents the arguments."""
    check_new(Path(output))
    check_apart(Path(directory), Path(output))
    checkpoint = open_checkpoint(directory)
    if is_packed(checkpoint.config):
        raise ValueError(
            f"{directory} is already packed; `unpack` stores it dense again"
        )
    linears = decoder_linears(checkpoint)
    if only_2of4:
        sparse = set(two_of_four_layers(checkpoint))
    else:
        # a checkpoint that names its 2:4 layers was pruned in part, by a plan perhaps
        named = marker.read(checkpoint.config)
        sparse = set(linears if named is None else named)
        if named and sparse.isdisjoint(linears) and not packed_integers(checkpoint):
            raise ValueError(
                f"{directory}: config.json names {min(sparse)} as 2:4, and the decoder "
                "layers have no such Linear, nor any other that it names; correct the "
                f"names under {marker.KEY!r}, or pack whatever is 2:4 with --only-2of4"
            )
        for module in sparse & linears.keys():
            if linears[module].shape[1] % 4:
                raise not_two_of_four(linears[module])
    chosen = _uniform(sparse, checkpoint)
    layers = [module for module in linears if module in chosen]
    if not layers:
        raise NothingToPackError(_nothing_to_pack(checkpoint))
    zeros = sum(prod(linears[layer].shape) // 2 for layer in layers)
    entries = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    config = packed_config(checkpoint.config, layers, round(zeros / entries, 6))
    modules = {linears[layer].name: layer for layer in layers}
    transfers: dict[str, list[Transfer]] = {
        shard: [
            Pack(modules[t.name], t) if t.name in modules else Copy(t) for t in tensors
        ]
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
    parts = {t.name for u in packed for t in (u.bitmask, u.shape)}
    starts = {u.compressed.name: u for u in packed}
    transfers: dict[str, list[Transfer]] = {
        shard: [starts.get(t.name) or Copy(t) for t in tensors if t.name not in parts]
        for shard, tensors in checkpoint.shards.items()
    }
    layers = [u.module for u in packed]
    config = dense_config(checkpoint.config, layers)
    return _convert(checkpoint, Path(output), config, layers, transfers)


def two_of_four_layers(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the decoder's dense-stored Linears that are 2:4."""
    linears = decoder_linears(checkpoint)
    answers = in_threads(is_two_of_four, linears.values())
    progress = tqdm(answers, "finding 2:4 layers", total=len(linears), leave=False)
    return [module for module, yes in zip(linears, progress, strict=True) if yes]


def unstructured_layers(checkpoint: Checkpoint, two_of_four: Set[str]) -> list[str]:
    """Return the names of the decoder's dense-stored Linears that are sparse otherwise.

    :param two_of_four: names of the 2:4 ones
    """
    linears = decoder_linears(checkpoint)
    others = {name: linears[name] for name in linears if name not in two_of_four}
    return [
        module
        for module, share in zip(
            others, in_threads(zeros_at_start, others.values()), strict=True
        )
        if share >= SPARSE
    ]


def packed_layers(checkpoint: Checkpoint) -> list[Unpack]:
    """Return the packed layers of a checkpoint whose config says that it is packed.

    Their headers have been checked.

    :raises ValueError: if there are none, parts are missing or do not fit together
    """
    if not is_packed(checkpoint.config):
        raise ValueError(
            f"{checkpoint.directory} is not packed: config.json has no sparsity_config "
            "with format sparse-24-bitmask; its storage is dense already"
        )
    found = packed_parts(checkpoint)
    if not found:
        raise ValueError(
            f"{checkpoint.directory} says that it is packed, but has no tensor named "
            "*.compressed"
        )
    return found


def packed_parts(checkpoint: Checkpoint) -> list[Unpack]:
    """Return the packed layers of a checkpoint, whatever its config says.

    Their headers have been checked.

    :raises ValueError: if parts are missing or do not fit together
    """
    found = []
    kinds = ("compressed", "bitmask", "shape")
    for name, tensor in checkpoint.tensors.items():
        module, _, kind = name.rpartition(".")
        if kind not in kinds[:2]:
            continue
        parts = [checkpoint.tensors.get(f"{module}.{kind}") for kind in kinds]
        missing = [k for k, part in zip(kinds, parts, strict=True) if part is None]
        if missing:
            raise ValueError(
                f"{name} in {tensor.file} has no {module}.{missing[0]} beside it; the "
                "checkpoint is incomplete"
            )
        if kind == "compressed":
            found.append(Unpack(module, *(part for part in parts if part)))
            found[-1].check()
    return found


def _uniform(sparse: Set[str], checkpoint: Checkpoint) -> set[str]:
    """Return the sparse modules without those of groups that are only partly sparse."""
    modules = [
        name.rpartition(".")[0]
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == 2
    ]
    kept = set(sparse)
    for inside, outside in mixed_groups(sparse, modules):
        kept -= set(inside)
        warnings.warn(
            f"{', '.join(inside)} stay dense: servers fuse them with "
            f"{', '.join(outside)}, which cannot be packed",
            CheckpointWarning,
            stacklevel=3,
        )
    return kept


def _nothing_to_pack(checkpoint: Checkpoint) -> str:
    if packed_integers(checkpoint):
        return (
            f"nothing in {checkpoint.directory} can be packed: its weights are "
            "integers packed into words (W4A16), which no server reads in a 2:4 storage"
        )
    return (
        f"nothing in {checkpoint.directory} can be packed: no Linear of its decoder "
        "layers is 2:4 together with every layer that servers fuse it with"
    )


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
