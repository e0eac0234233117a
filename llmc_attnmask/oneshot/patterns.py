"""Write names of modules as the patterns that recipes name them by."""

import re
from collections.abc import Iterable, Mapping, Sequence

from llmc_attnmask.checkpoint.linears import EXPERT

_LAYER = re.compile(r"(.*?\.)(\d+)((?:\..*)?)")  # its number, and what is around


def by_pattern(sparsities: Mapping[str, float]) -> dict[str, float]:
    """Return patterns that match modules with the same sparsity, and that sparsity."""
    return {
        pattern: sparsity
        for sparsity in sorted(set(sparsities.values()))
        for pattern in patterns([n for n, s in sparsities.items() if s == sparsity])
    }


def patterns(names: Sequence[str]) -> list[str]:
    """Return patterns that match these modules, and all experts beside an expert.

    Modules in the same layers that have the same parent share a pattern. It ends in a
    word boundary and not in ``$``, because SparseGPTModifier adds a dot to the names of
    its targets.
    """
    layers: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        parent, _, child = EXPERT.sub(r"\1*", name).rpartition(".")
        match = _LAYER.fullmatch(parent)
        assert match is not None, parent  # groups are in the decoder's blocks
        before, layer, after = match.groups()
        layers.setdefault((before, after, child), []).append(layer)
    children: dict[tuple[str, str, str], list[str]] = {}
    for (before, after, child), numbers in layers.items():
        place = (before, _either(dict.fromkeys(numbers)), after)
        children.setdefault(place, []).append(re.escape(child))
    return [
        f"re:{_escaped(before)}{numbers}{_escaped(after)}\\.{_either(some)}\\b"
        for (before, numbers, after), some in children.items()
    ]


def _escaped(name: str) -> str:
    """Return a pattern of a name, in which a star stands for an expert's number."""
    return re.escape(name).replace(r"\*", r"\d+")


def _either(parts: Iterable[str]) -> str:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"
