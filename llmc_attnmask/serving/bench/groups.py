"""The layers of a checkpoint as servers fuse them, and which of them are alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from llmc_attnmask.checkpoint import scan
from llmc_attnmask.checkpoint.io.files import Checkpoint
from llmc_attnmask.checkpoint.io.threads import in_threads
from llmc_attnmask.checkpoint.linears import EXPERT, decoder_linears, served_groups
from llmc_attnmask.checkpoint.selection import packed_parts

WIDTH = 0.05  # densities that differ by less count as the same


@dataclass(frozen=True)
class Part:
    """One Linear of the checkpoint."""

    module: str
    shape: tuple[int, int]  # [out, in]
    itemsize: int
    zeros: float  # share of entries; of a dense-stored one, in its first megabyte


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


def groups(checkpoint: Checkpoint) -> tuple[list[Group], list[str]]:
    """Return a checkpoint's layers, alike ones together, and the experts left out.

    Layers are alike if they have the same children, shapes and about the same zeros.

    :return: groups, and names of Linears of experts, which servers compute elsewhere
    """
    parts = _parts(checkpoint)
    experts = [module for module in parts if EXPERT.search(module)]
    found: dict[tuple[object, ...], Group] = {}
    others = [module for module in parts if module not in set(experts)]
    for name, members in served_groups(others).items():
        order = name.rpartition(".")[2].split("+")  # in which servers fuse them
        by_child = {member.rpartition(".")[2]: member for member in members}
        group = Group([parts[by_child[child]] for child in order])
        alike = tuple(
            (p.shape, p.itemsize, round(p.zeros / WIDTH)) for p in group.parts
        )
        found.setdefault((group.kind, alike), group).names.append(group.parent)
    return list(found.values()), experts


def _parts(checkpoint: Checkpoint) -> dict[str, Part]:
    dense = decoder_linears(checkpoint)
    shares = in_threads(scan.zeros_at_start, dense.values())
    found = {
        module: Part(module, (t.shape[0], t.shape[1]), t.itemsize, zeros)
        for (module, t), zeros in zip(dense.items(), shares, strict=True)
    }
    for layer in packed_parts(checkpoint):
        values = layer.parts["compressed"]
        zeros = 1 - prod(values.shape) / max(1, prod(layer.shape))
        found[layer.module] = Part(layer.module, layer.shape, layer.itemsize, zeros)
    return found
