"""The part of config.json that says how weights are stored."""

import reprlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

from llmc_attnmask.checkpoint import layout, marker

Storage = Literal["dense", "sparse-24-bitmask"]

# The last compressed-tensors that vLLM's native 2:4 was built on. Its reader and this
# package's agree on the layout, whichever version is installed.
_VERSION = "0.13.0"


def sparsity_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the non-empty ``sparsity_config`` of a checkpoint, or None.

    :raises ValueError: for a storage that is neither dense nor sparse-24-bitmask
    """
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise ValueError("config.json has a quantization_config that is not a mapping")
    sparsity = quantization.get("sparsity_config") or {}
    if not sparsity:
        return None
    found = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
    if found not in ("dense", layout.NAME):
        raise ValueError(
            f"config.json has a sparsity_config with format {reprlib.repr(found)}; "
            f'expected "dense" or "{layout.NAME}"'
        )
    return sparsity


def is_packed(config: Mapping[str, Any]) -> bool:
    """Return whether the storage is sparse-24-bitmask.

    :raises ValueError: for other sparse storages
    """
    sparsity = sparsity_config(config)
    return sparsity is not None and sparsity["format"] == layout.NAME


def packed_config(
    config: Mapping[str, Any], targets: Sequence[str], sparsity: float
) -> dict[str, Any]:
    """Return a dense-stored checkpoint's config as it is with its 2:4 layers packed.

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
            "compressed-tensors or no quantization; 2:4 storage works with nothing else"
        )
    dense = [t for t in marker.read(changed) or [] if t not in set(targets)]
    marker.write(changed, dense, marker.read_unstructured(changed))
    changed["quantization_config"] = {
        "version": _VERSION,
        **quantization,
        "quant_method": method,
        "sparsity_config": {
            "format": layout.NAME,
            "sparsity_structure": marker.STRUCTURE,
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
