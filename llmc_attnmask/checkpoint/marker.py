"""The marker in config.json that says which layers of a dense checkpoint are sparse.

It is a top-level key that transformers and vLLM keep and ignore:

    "llmc_attnmask": {
        "version": 1,
        "sparsity": {"structure": "2:4", "targets": ["model.layers.0.mlp.up_proj"]},
        "unstructured": {"targets": ["model.layers.1.mlp.up_proj"]}
    }

``targets`` are module names, spelled as in the names of the checkpoint's tensors.
``unstructured`` is absent if it would be empty.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

KEY = "llmc_attnmask"
VERSION = 1
STRUCTURE = "2:4"
UNSTRUCTURED = "unstructured"


def write(
    config: dict[str, Any], targets: Sequence[str], unstructured: Sequence[str] = ()
) -> None:
    """Mark the sparse layers in a config, replacing any earlier marker.

    :param config: content of config.json
    :param targets: names of the modules that are 2:4
    :param unstructured: names of other sparse modules; without any name, the marker is
        removed
    """
    config.pop(KEY, None)
    if targets or unstructured:
        sparsity = {"structure": STRUCTURE, "targets": list(targets)}
        config[KEY] = {"version": VERSION, "sparsity": sparsity}
    if unstructured:
        config[KEY][UNSTRUCTURED] = {"targets": list(unstructured)}


def read(config: Mapping[str, Any]) -> list[str] | None:
    """Return the module names that a config marks as 2:4, or None without a marker.

    :raises ValueError: if the marker is malformed or has another version
    """
    note = _note(config)
    if note is None:
        return None
    sparsity = note.get("sparsity")
    if not isinstance(sparsity, Mapping) or sparsity.get("structure") != STRUCTURE:
        raise _malformed(note, f'a sparsity with structure "{STRUCTURE}"')
    return _targets(note, sparsity)


def read_unstructured(config: Mapping[str, Any]) -> list[str]:
    """Return the module names that a config marks as sparse, but not 2:4.

    :raises ValueError: if the marker is malformed or has another version
    """
    note = _note(config)
    if note is None or UNSTRUCTURED not in note:
        return []
    found = note[UNSTRUCTURED]
    if not isinstance(found, Mapping):
        raise _malformed(note, f"{UNSTRUCTURED} that is a mapping")
    return _targets(note, found)


def _note(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if KEY not in config:
        return None
    note = config[KEY]
    if not isinstance(note, Mapping):
        raise _malformed(note, "a mapping")
    if note.get("version") != VERSION:
        raise _malformed(
            note, f"version {VERSION}: a newer llmc-attnmask may have written it"
        )
    return note


def _targets(note: object, sparsity: Mapping[str, Any]) -> list[str]:
    targets = sparsity.get("targets")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise _malformed(note, "targets that are a list of module names")
    return list(targets)


def _malformed(note: object, expected: str) -> ValueError:
    shown = reprlib.repr(note)  # however long or deep it is
    return ValueError(f"config.json has {KEY!r}: {shown}; expected {expected}")
