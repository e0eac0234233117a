"""Choose the layers of a checkpoint that are packed, or find those that are."""

import warnings
from collections.abc import Mapping, Sequence, Set
from math import prod

import torch
from tqdm import tqdm

from llmc_attnmask.checkpoint import marker, scan
from llmc_attnmask.checkpoint.config import PackedStorage, packed_storage
from llmc_attnmask.checkpoint.io.files import Checkpoint, StoredTensor
from llmc_attnmask.checkpoint.io.threads import in_threads
from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask, sparse_bitmask
from llmc_attnmask.checkpoint.linears import (
    decoder_linears,
    is_decoder_linear,
    mixed_groups,
    packed_integers,
)
from llmc_attnmask.checkpoint.transfers import base
from llmc_attnmask.checkpoint.transfers import sparse_24_bitmask as two_of_four
from llmc_attnmask.checkpoint.transfers import sparse_bitmask as any_mask

# Share of zeros from which a layer counts as sparse. With fewer, an 8-bit weight would
# take more room packed, because of its bitmask. Row offsets take 8 bytes per row more.
SPARSE = 0.125


def is_sparse(entries: int, shape: Sequence[int]) -> bool:
    """Return whether a layer has as many zeros as it takes.

    :param entries: that are not +0.0
    :param shape: of the weight
    """
    return entries <= (1 - SPARSE) * prod(shape)


class CheckpointWarning(UserWarning):
    """Layers are not stored the way that was requested."""


class NothingToPackError(ValueError):
    """A checkpoint has no layer that can be packed."""


def to_pack(
    checkpoint: Checkpoint, storage: PackedStorage, only_2of4: bool
) -> Sequence[base.Pack]:
    """Return the transfers of the layers to pack, in the order of their weights.

    ``report.conversion.pack`` documents which ones they are.

    :raises NotTwoOfFourError: for a layer that should be 2:4
    :raises NothingToPackError: if there are none
    """
    chosen: Sequence[base.Pack]
    if storage == sparse_bitmask.NAME:
        chosen = _with_any_mask(checkpoint)
    else:
        chosen = _two_of_four(checkpoint, only_2of4)
    if not chosen:
        raise NothingToPackError(_nothing_to_pack(checkpoint, storage))
    return chosen


def _two_of_four(checkpoint: Checkpoint, only_2of4: bool) -> list[two_of_four.Pack]:
    linears = decoder_linears(checkpoint)
    if only_2of4:
        sparse = set(two_of_four_layers(linears))
    else:
        # a checkpoint that names its 2:4 layers was pruned in part, by a plan perhaps
        named = marker.read(checkpoint.config)
        sparse = set(linears if named is None else named)
        if named and sparse.isdisjoint(linears) and not packed_integers(checkpoint):
            raise ValueError(
                f"{checkpoint.directory}: config.json names {min(sparse)} as 2:4, and "
                "the decoder layers have no such Linear, nor any other that it names; "
                f"correct the names under {marker.KEY!r}, or pack whatever is 2:4 with "
                "--only-2of4"
            )
        for module in sparse & linears.keys():
            if linears[module].shape[1] % 4:
                raise scan.not_two_of_four(linears[module])
    chosen = _uniform(sparse, checkpoint)
    return [two_of_four.Pack(m, t) for m, t in linears.items() if m in chosen]


def _with_any_mask(checkpoint: Checkpoint) -> list[any_mask.Pack]:
    linears = decoder_linears(checkpoint)
    named = set(marker.read(checkpoint.config) or ()) & linears.keys()
    for module in sorted(
        named - set(two_of_four_layers({m: linears[m] for m in named}))
    ):
        raise scan.not_two_of_four(linears[module])
    counts = in_threads(scan.entries, linears.values())
    progress = tqdm(counts, "finding sparse layers", total=len(linears), leave=False)
    return [
        any_mask.Pack(module, tensor, entries)
        for (module, tensor), entries in zip(linears.items(), progress, strict=True)
        if is_sparse(entries, tensor.shape)
    ]


def two_of_four_layers(linears: Mapping[str, StoredTensor]) -> list[str]:
    """Return the names of those Linears that are 2:4."""
    answers = in_threads(scan.is_two_of_four, linears.values())
    progress = tqdm(answers, "finding 2:4 layers", total=len(linears), leave=False)
    return [module for module, yes in zip(linears, progress, strict=True) if yes]


def unstructured_layers(
    linears: Mapping[str, StoredTensor], two_of_four: Set[str]
) -> list[str]:
    """Return the names of those Linears that are sparse, but not 2:4.

    :param two_of_four: names of the 2:4 ones
    """
    others = {name: linears[name] for name in linears if name not in two_of_four}
    counts = in_threads(scan.entries, others.values())
    return [
        name
        for name, entries in zip(others, counts, strict=True)
        if is_sparse(entries, others[name].shape)
    ]


def structure(layer: base.Unpack) -> str | None:
    """Return what a marker would call a packed layer; None if it would not name it."""
    if not is_decoder_linear(layer.module):
        return None
    entries, two_of_four = 0, layer.shape[1] % 4 == 0
    for _, rows in layer.rows():
        entries += int(torch.count_nonzero(rows))
        two_of_four = two_of_four and not sparse_24_bitmask.crowded_groups(rows)
    if two_of_four:
        return marker.STRUCTURE
    return marker.UNSTRUCTURED if is_sparse(entries, layer.shape) else None


def packed_layers(checkpoint: Checkpoint) -> list[base.Unpack]:
    """Return the packed layers of a checkpoint whose config says that it is packed.

    Their headers have been checked.

    :raises ValueError: if there are none, parts are missing or do not fit together
    """
    storage = packed_storage(checkpoint.config)
    if storage is None:
        raise ValueError(
            f"{checkpoint.directory} is not packed: config.json has no sparsity_config "
            f"with format {sparse_24_bitmask.NAME} or {sparse_bitmask.NAME}; its "
            "storage is dense already"
        )
    found = packed_parts(checkpoint)
    if not found:
        raise ValueError(
            f"{checkpoint.directory} says that it is packed, but has no tensor named "
            "*.compressed"
        )
    for layer in found:
        if layer.storage != storage:
            raise ValueError(
                f"{layer.place} is stored as {layer.storage}, but config.json says "
                f"{storage}; the two come from different checkpoints"
            )
    return found


def packed_parts(checkpoint: Checkpoint) -> list[base.Unpack]:
    """Return the packed layers of a checkpoint, whatever its config says.

    Their headers have been checked.

    :raises ValueError: if parts are missing or do not fit together
    """
    found: list[base.Unpack] = []
    tensors = checkpoint.tensors
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("compressed", "bitmask"):
            continue
        values = tensors.get(f"{module}.compressed", tensor)
        # the values of a weight with any mask have no rows
        in_rows = len(values.shape) != 1
        of = two_of_four if in_rows else any_mask
        kinds = of.layout.Packed._fields
        parts = {k: t for k in kinds if (t := tensors.get(f"{module}.{k}"))}
        if missing := [k for k in kinds if k not in parts]:
            raise ValueError(
                f"{name} in {tensor.file} has no {module}.{missing[0]} beside it; the "
                "checkpoint is incomplete"
            )
        if kind == "compressed":
            found.append(of.Unpack(module, parts))
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
            stacklevel=5,
        )
    return kept


def _nothing_to_pack(checkpoint: Checkpoint, storage: PackedStorage) -> str:
    if packed_integers(checkpoint):
        return (
            f"nothing in {checkpoint.directory} can be packed: its weights are "
            "integers packed into words (W4A16), which no server reads in a sparse "
            "storage"
        )
    if storage == sparse_bitmask.NAME:
        return (
            f"nothing in {checkpoint.directory} can be packed: in no Linear of its "
            f"decoder layers are {SPARSE:.1%} of the entries zeros"
        )
    return (
        f"nothing in {checkpoint.directory} can be packed: no Linear of its decoder "
        "layers is 2:4 together with every layer that servers fuse it with; "
        "--storage sparse-bitmask packs layers with zeros anywhere"
    )
