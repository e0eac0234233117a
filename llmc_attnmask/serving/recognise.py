"""Which checkpoints are ours, and which of their layers are 2:4; from config.json."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmc_attnmask.checkpoint import layout, marker

METHOD = "llmc_attnmask"  # the name of our quantization method in vLLM
QUANTIZATION = "quantization_config"
SPARSITY = "sparsity_config"


@dataclass(frozen=True)
class Sparsity:
    """The 2:4 layers of a checkpoint."""

    storage: Literal["packed", "dense"]
    targets: tuple[str, ...]  # names, "re:" patterns, or the class name Linear
    ignore: tuple[str, ...] = ()

    def matches(self, name: str) -> bool:
        """Whether the module of this name is one of them."""
        if any(_matches(name, pattern) for pattern in self.ignore):
            return False
        return any(
            target == "Linear" or _matches(name, target) for target in self.targets
        )


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern


def annotate(config: dict[str, Any]) -> bool:
    """Put the note of a dense-stored checkpoint where vLLM looks: into a
    quantization_config, made if there is none. Other configs stay as they are.

    :param config: content of config.json
    :return: whether there is a note
    :raises ValueError: for a malformed note
    """
    if marker.read(config) is None:
        return False
    quantization = dict(config.get(QUANTIZATION) or {"quant_method": METHOD})
    quantization[marker.KEY] = config[marker.KEY]
    config[QUANTIZATION] = quantization
    return True


def recognise(quantization: Mapping[str, Any]) -> Sparsity | None:
    """The 2:4 layers that a quantization_config names; None if it is not ours.

    :param quantization: ``quantization_config``, after ``annotate``
    :raises ValueError: for a malformed note
    """
    if quantization.get("quant_method") not in ("compressed-tensors", METHOD):
        return None
    targets = marker.read(quantization)
    if targets is not None:
        return Sparsity("dense", tuple(targets))
    sparsity = quantization.get(SPARSITY)
    if not isinstance(sparsity, Mapping) or sparsity.get("format") != layout.NAME:
        return None
    if sparsity.get("sparsity_structure") != "2:4" or not sparsity.get("targets"):
        return None
    ignore: Sequence[str] = sparsity.get("ignore") or ()
    return Sparsity("packed", tuple(sparsity["targets"]), tuple(ignore))
