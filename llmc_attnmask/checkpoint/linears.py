"""Find the tensors of a checkpoint that are Linear weights expected to be 2:4."""

import re
from collections.abc import Iterable, Sequence, Set

from llmc_attnmask.checkpoint.io.files import Checkpoint, StoredTensor

_IN_DECODER = re.compile(r"(^|\.)(layers|h|blocks|block)\.\d+\.")
EXPERT = re.compile(r"(\.experts\.)\d+\b")
_ROUTERS = {"gate", "router", "shared_expert_gate"}  # of mixture-of-experts models
_DTYPES = {"F32", "F16", "BF16", "I8", "F8_E4M3", "F8_E5M2"}

# Modules that servers fuse into one matrix, which is sparse as a whole or not at all.
_FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),  # Mixtral's gate and up
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek's latent attention
)


def decoder_linears(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return module name -> weight [out, in] of every Linear in the decoder layers.

    These are neither embeddings, the output layer, norms, biases or the routers of
    mixture-of-experts models, nor weights of other dtypes, such as 4-bit integers
    packed into words.
    """
    found = {}
    for tensor in checkpoint.tensors.values():
        module, _, kind = tensor.name.rpartition(".")
        if (
            kind == "weight"
            and len(tensor.shape) == 2
            and tensor.bytes
            and tensor.dtype in _DTYPES
            and is_decoder_linear(module)
        ):
            found[module] = tensor
    return found


def is_decoder_linear(module: str) -> bool:
    """Return whether a module is in a decoder layer, and not a router, by its name."""
    return (
        _IN_DECODER.search(module) is not None
        and module.rpartition(".")[2] not in _ROUTERS
    )


def output_layer(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return the name and weight of the output layer, or of an embedding that is one.

    :return: empty if there is neither by a usual name
    """
    for ending in ("lm_head.weight", "embed_out.weight", "embed_tokens.weight"):
        for tensor in checkpoint.tensors.values():
            if tensor.name.endswith(ending):
                return {tensor.name.removesuffix(".weight"): tensor}
    return {}


def packed_integers(checkpoint: Checkpoint) -> list[str]:
    """Return the decoder modules with integer weights packed into words (W4A16)."""
    names = (name.rpartition(".") for name in checkpoint.tensors)
    return [
        m for m, _, kind in names if kind == "weight_packed" and _IN_DECODER.search(m)
    ]


def mixed_groups(
    sparse: Set[str], modules: Iterable[str]
) -> list[tuple[list[str], list[str]]]:
    """Return the groups that servers fuse but of which only a part is sparse.

    :param sparse: names of the sparse modules
    :param modules: names of all modules with a weight matrix
    :return: for each such group, its sparse members and its dense ones
    """
    known = set(modules)
    mixed = []
    for parent in sorted({module.rpartition(".")[0] for module in sparse}):
        for group in _FUSED:
            members = [name for x in group if (name := f"{parent}.{x}") in known]
            inside = [name for name in members if name in sparse]
            if inside and len(inside) < len(members):
                mixed.append((inside, [n for n in members if n not in sparse]))
    return mixed


def served_groups(modules: Iterable[str]) -> dict[str, list[str]]:
    """Group modules that servers keep in one matrix; all experts of a layer together.

    :param modules: names of modules with a weight matrix
    :return: name of a group -> its members, in the order of their first member; a
        group's name is its parent's and the last parts of its members' names
    """
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for module in modules:
        parent, _, child = module.rpartition(".")
        fused = next((group for group in _FUSED if child in group), (child,))
        place = (EXPERT.sub(r"\1*", parent), fused)
        found.setdefault(place, []).append(module)
    groups = {}
    for (parent, fused), members in found.items():
        children = {module.rpartition(".")[2] for module in members}
        name = f"{parent}.{'+'.join(child for child in fused if child in children)}"
        groups[name] = members
    return groups


def single_groups(
    modules: Iterable[str], alike: Iterable[Sequence[str]]
) -> dict[str, list[str]]:
    """Make each module a group, with those of other experts and those pruned alike.

    :param modules: names of modules with a weight matrix
    :param alike: modules that belong to one group; lists that overlap are one
    :return: as of ``served_groups``
    """
    together: dict[str, set[str]] = {}
    for members in alike:
        merged = set(members).union(*(together.get(name, ()) for name in members))
        together |= dict.fromkeys(merged, merged)
    found: dict[str, list[str]] = {}
    for module in modules:
        first = min(together.get(module, (module,)))
        found.setdefault(EXPERT.sub(r"\1*", first), []).append(module)
    groups = {}
    for first, members in found.items():
        parent = first.rpartition(".")[0]
        children = dict.fromkeys(module.rpartition(".")[2] for module in members)
        groups[f"{parent}.{'+'.join(children)}"] = members
    return groups
