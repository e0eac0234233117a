"""Recognize this package's checkpoints and their sparse layers from config.json."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import regex

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask, sparse_bitmask

METHOD = "llmc_attnmask"  # name of this package's quantization method in vLLM
QUANTIZATION = "quantization_config"
SPARSITY = "sparsity_config"
_SECONDS = 1  # limit for matching one pattern with one name


@dataclass(frozen=True)
class Sparsity:
    """The sparse layers of a checkpoint.

    They are named, or described by "re:" patterns or the class "Linear".
    """

    two_of_four: tuple[str, ...] = ()  # by the marker
    unstructured: tuple[str, ...] = ()  # by the marker
    packed: tuple[str, ...] = ()  # stored as ``storage``
    storage: str = "dense"
    ignore: tuple[str, ...] = ()  # not packed, whatever ``packed`` says

    def is_packed(self, name: str) -> bool:
        """Return whether the module of this name is stored packed."""
        if any(_matches(name, pattern) for pattern in self.ignore):
            return False
        return any(
            target == "Linear" or _matches(name, target) for target in self.packed
        )

    def structure(self, name: str) -> Literal["2:4", "unstructured", "dense"]:
        """Return the structure of the module of this name, in any storage."""
        packed = self.is_packed(name)
        if name in self.two_of_four or (
            packed and self.storage == sparse_24_bitmask.NAME
        ):
            return "2:4"
        return "unstructured" if packed or name in self.unstructured else "dense"

    def is_sparse(self, name: str) -> bool:
        """Return whether the module of this name is sparse."""
        return self.structure(name) != "dense"


def _matches(name: str, pattern: str) -> bool:
    if not pattern.startswith("re:"):
        return name == pattern
    try:
        return regex.match(pattern[3:], name, timeout=_SECONDS) is not None
    except TimeoutError:  # the checkpoint's author chose it, by mistake or on purpose
        raise ValueError(
            f"config.json has a {SPARSITY} with the pattern {pattern!r}, which takes "
            f"more than {_SECONDS} s to match with {name!r}; name the modules instead"
        ) from None


def annotate(config: dict[str, Any]) -> bool:
    """Copy the marker of a dense-stored checkpoint to where vLLM looks for it.

    That is the quantization_config, which is created if there is none. Other configs
    stay as they are.

    :param config: content of config.json
    :return: whether there is a marker
    :raises ValueError: for a malformed marker
    """
    if marker.read(config) is None:
        return False
    found = config.get(QUANTIZATION) or {"quant_method": METHOD}
    if not isinstance(found, Mapping):
        raise ValueError(f"config.json has a {QUANTIZATION} that is not a mapping")
    quantization = dict(found)
    quantization[marker.KEY] = config[marker.KEY]
    config[QUANTIZATION] = quantization
    return True


def recognise(quantization: Mapping[str, Any]) -> Sparsity | None:
    """Return the sparse layers that a quantization_config names; None if it names none.

    :param quantization: ``quantization_config``, after ``annotate``
    :raises ValueError: for a malformed marker, or targets that are not names
    """
    if quantization.get("quant_method") not in ("compressed-tensors", METHOD):
        return None
    found = Sparsity(
        two_of_four=tuple(marker.read(quantization) or ()),
        unstructured=tuple(marker.read_unstructured(quantization)),
    )
    sparsity = quantization.get(SPARSITY)
    if isinstance(sparsity, Mapping) and _is_ours(sparsity):
        found = replace(
            found,
            packed=_names(sparsity, "targets"),
            storage=sparsity["format"],
            ignore=_names(sparsity, "ignore"),
        )
    return found if found.packed or found.two_of_four or found.unstructured else None


def _is_ours(sparsity: Mapping[str, Any]) -> bool:
    if sparsity.get("format") == sparse_bitmask.NAME:
        return True  # the structure is at most a summary of all layers
    return (
        sparsity.get("format") == sparse_24_bitmask.NAME
        and sparsity.get("sparsity_structure") == marker.STRUCTURE
    )


def _names(sparsity: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return the validated names and patterns under a key."""
    found = sparsity.get(key) or []
    try:
        if not isinstance(found, list) or not all(isinstance(n, str) for n in found):
            raise ValueError("expected a list of module names")
        for name in found:
            if name.startswith("re:"):
                regex.compile(name[3:])
    except (ValueError, regex.error, RecursionError) as error:
        raise ValueError(
            f"config.json has a {SPARSITY} with {key} {reprlib.repr(found)}: {error}"
        ) from None
    return tuple(found)
