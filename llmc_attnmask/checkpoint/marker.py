"""The marker in config.json that says which layers of a dense checkpoint are 2:4.

It is a top-level key that transformers and vLLM keep and ignore:

    "llmc_attnmask": {
        "version": 1,
        "sparsity": {"structure": "2:4", "targets": ["model.layers.0.mlp.up_proj"]}
    }

``targets`` are module names, spelled as in the names of the checkpoint's tensors.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

KEY = "llmc_attnmask"
VERSION = 1
STRUCTURE = "2:4"


def write(config: dict[str, Any], targets: Sequence[str]) -> None:
    """Mark the 2:4 layers in a config, replacing any earlier marker.

    :param config: content of config.json
    :param targets: module names; without any, the marker is removed
    """
    config.pop(KEY, None)
    if targets:
        sparsity = {"structure": STRUCTURE, "targets": list(targets)}
        config[KEY] = {"version": VERSION, "sparsity": sparsity}


def read(config: Mapping[str, Any]) -> list[str] | None:
    """Return the module names that a config marks as 2:4, or None without a marker.

    :raises ValueError: if the marker is malformed or has another version
    """
    if KEY not in config:
        return None
    note = config[KEY]
    if not isinstance(note, Mapping):
        raise _malformed(note, "a mapping")
    if note.get("version") != VERSION:
        raise _malformed(
            note, f"version {VERSION}: a newer llmc-attnmask may have written it"
        )
    sparsity = note.get("sparsity")
    if not isinstance(sparsity, Mapping) or sparsity.get("structure") != STRUCTURE:
        raise _malformed(note, f'a sparsity with structure "{STRUCTURE}"')
    targets = sparsity.get("targets")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise _malformed(note, "targets that are a list of module names")
    return list(targets)


def _malformed(note: object, expected: str) -> ValueError:
    shown = reprlib.repr(note)  # however long or deep it is
    return ValueError(f"config.json has {KEY!r}: {shown}; expected {expected}")
