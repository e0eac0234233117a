"""The layers of a checkpoint as servers fuse them, and which of them are alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from llmc_attnmask.checkpoint import scan
from llmc_attnmask.checkpoint.io.files import Checkpoint
from llmc_attnmask.checkpoint.io.threads import in_threads
from llmc_attnmask.checkpoint.linears import EXPERT, decoder_linears, served_groups
from llmc_attnmask.checkpoint.selection import packed_parts
from llmc_attnmask.serving.recognise import Sparsity

WIDTH = 0.05  # densities that differ by less count as the same


@dataclass(frozen=True)
class Part:
    """One Linear of the checkpoint."""

    module: str
    shape: tuple[int, int]  # [out, in]
    dtype: str  # as safetensors spells it
    itemsize: int
    storage: str
    structure: str  # according to config.json
    zeros: float  # share of entries; of a dense-stored one, in its first megabyte

    def is_like(self, other: "Part") -> bool:
        """Return whether another one would be served alike, at about the same speed."""
        mine, its = (
            (part.shape, part.dtype, part.storage, part.structure)
            for part in (self, other)
        )
        return mine == its and abs(self.zeros - other.zeros) < WIDTH


@dataclass
class Group:
    """A layer that servers keep in one matrix, and others like it."""

    parts: Sequence[Part]
    names: list[str] = field(default_factory=list)  # of all layers like this one

    @property
    def parent(self) -> str:
        return self.parts[0].module.rpartition(".")[0]

    @property
    def kind(self) -> str:
        return "+".join(part.module.rpartition(".")[2] for part in self.parts)

    @property
    def rows(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    @property
    def columns(self) -> int:
        return self.parts[0].shape[1]

    @property
    def dense_bytes(self) -> int:
        return sum(prod(part.shape) * part.itemsize for part in self.parts)

    @property
    def zeros(self) -> float:
        entries = sum(prod(part.shape) for part in self.parts)
        return sum(part.zeros * prod(part.shape) for part in self.parts) / entries


def groups(checkpoint: Checkpoint, sparsity: Sparsity) -> tuple[list[Group], list[str]]:
    """Return a checkpoint's layers, alike ones together, and the experts left out.

    Layers are alike if they have the same children, and these are alike.

    :param sparsity: what config.json says about the layers
    :return: groups, and names of Linears of experts, which servers compute elsewhere
    :raises ValueError: if parts of one layer have different numbers of inputs
    """
    parts = _parts(checkpoint, sparsity)
    experts = [module for module in parts if EXPERT.search(module)]
    others = [module for module in parts if module not in set(experts)]
    found: list[Group] = []
    for name, members in served_groups(others).items():
        order = name.rpartition(".")[2].split("+")  # in which servers fuse them
        by_child = {member.rpartition(".")[2]: member for member in members}
        group = Group([parts[by_child[child]] for child in order])
        if len({part.shape[1] for part in group.parts}) > 1:
            shapes = ", ".join(f"{p.module} {list(p.shape)}" for p in group.parts)
            raise ValueError(
                f"{shapes}: servers fuse these Linears, so they need the same number "
                "of inputs"
            )
        known = next((other for other in found if _alike(group, other)), group)
        known.names.append(group.parent)
        if known is group:
            found.append(group)
    return found, experts


def _alike(group: Group, other: Group) -> bool:
    return group.kind == other.kind and all(
        mine.is_like(its) for mine, its in zip(group.parts, other.parts, strict=True)
    )


def _parts(checkpoint: Checkpoint, sparsity: Sparsity) -> dict[str, Part]:
    dense = decoder_linears(checkpoint)
    shares = in_threads(scan.zeros_at_start, dense.values())
    found = {}
    for (module, tensor), zeros in zip(dense.items(), shares, strict=True):
        found[module] = Part(
            module,
            shape=(tensor.shape[0], tensor.shape[1]),
            dtype=tensor.dtype,
            itemsize=tensor.itemsize,
            storage="dense",
            structure=sparsity.structure(module),
            zeros=zeros,
        )
    for layer in packed_parts(checkpoint):
        values = layer.parts["compressed"]
        found[layer.module] = Part(
            layer.module,
            shape=layer.shape,
            dtype=values.dtype,
            itemsize=layer.itemsize,
            storage=layer.storage,
            structure=sparsity.structure(layer.module),
            zeros=1 - prod(values.shape) / max(1, prod(layer.shape)),
        )
    return found
