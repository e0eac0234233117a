"""The part of config.json that says how weights are stored."""

import reprlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, get_args

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask, sparse_bitmask

PackedStorage = Literal["sparse-24-bitmask", "sparse-bitmask"]
Storage = Literal["dense", PackedStorage]

# The last compressed-tensors that vLLM's native 2:4 was built on. Its reader and this
# package's agree on the layouts, whichever version is installed.
_VERSION = "0.13.0"
_STRUCTURES = {  # as compressed-tensors calls them
    sparse_24_bitmask.NAME: marker.STRUCTURE,
    sparse_bitmask.NAME: marker.UNSTRUCTURED,
}


def sparsity_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the non-empty ``sparsity_config`` of a checkpoint, or None.

    :raises ValueError: for a storage that is not one of ``Storage``
    """
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise ValueError("config.json has a quantization_config that is not a mapping")
    sparsity = quantization.get("sparsity_config") or {}
    if not sparsity:
        return None
    found = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
    if found not in get_args(Storage):
        raise ValueError(
            f"config.json has a sparsity_config with format {reprlib.repr(found)}; "
            f"expected {', '.join(_STRUCTURES)} or dense"
        )
    return sparsity


def packed_storage(config: Mapping[str, Any]) -> PackedStorage | None:
    """Return the storage of a packed checkpoint, or None if it is stored dense.

    :raises ValueError: for other sparse storages
    """
    sparsity = sparsity_config(config)
    return sparsity["format"] if sparsity and sparsity["format"] != "dense" else None


def packed_config(
    config: Mapping[str, Any],
    storage: PackedStorage,
    targets: Sequence[str],
    sparsity: float,
) -> dict[str, Any]:
    """Return a dense-stored checkpoint's config as it is with sparse layers packed.

    The marker keeps the layers whose structure the storage does not tell.

    :param targets: names of the packed modules, each one because servers fuse layers
    :param sparsity: share of zeros in the whole checkpoint
    :raises ValueError: if a library other than compressed-tensors quantized it
    """
    changed = deepcopy(dict(config))
    quantization = changed.get("quantization_config") or {}
    method = quantization.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        raise ValueError(
            f"config.json says quant_method {reprlib.repr(method)}; expected "
            f"compressed-tensors or no quantization; {storage} works with nothing else"
        )
    if storage == sparse_24_bitmask.NAME:
        others = [t for t in marker.read(changed) or [] if t not in set(targets)]
        marker.write(changed, others, marker.read_unstructured(changed))
    changed["quantization_config"] = {
        "version": _VERSION,
        **quantization,
        "quant_method": method,
        "sparsity_config": {
            "format": storage,
            "sparsity_structure": _STRUCTURES[storage],
            "targets": list(targets),
            "ignore": [],
            "global_sparsity": sparsity,
            "registry_requires_subclass": False,
        },
    }
    return changed


def dense_config(
    config: Mapping[str, Any],
    targets: Sequence[str],
    unstructured: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the config as it is with all layers stored dense and sparse ones marked.

    :param targets: names of 2:4 modules, besides those that are marked already
    :param unstructured: names of other sparse modules; by default, those marked already
    """
    changed = deepcopy(dict(config))
    known = marker.read(changed) or []
    if unstructured is None:
        unstructured = marker.read_unstructured(changed)
    targets = [*targets, *(t for t in known if t not in set(targets))]
    marker.write(changed, targets, unstructured)
    quantization = changed.get("quantization_config") or {}
    quantization.pop("sparsity_config", None)
    if not quantization.get("config_groups"):
        changed.pop("quantization_config", None)
    return changed
