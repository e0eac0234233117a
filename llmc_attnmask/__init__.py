"""Prune language models with masks that keep the attention matrix softmax(QK^T).

Importing the package registers its modifiers with llm-compressor as soon as that is
imported. A serving environment does not need llm-compressor.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmc_attnmask.upstream.registration import import_with_llm_compressor
from llmc_attnmask.version import __version__ as __version__

if TYPE_CHECKING:
    from llmc_attnmask.checkpoint.inspect import inspect
    from llmc_attnmask.checkpoint.load import load
    from llmc_attnmask.evaluation.perplexity import evaluate
    from llmc_attnmask.modifiers import (
        ActivationSmoothingModifier,
        ALPSPruningModifier,
        AttentionMatrixPruningModifier,
        MaskedGPTQModifier,
        MaskedRecoveryModifier,
    )
    from llmc_attnmask.oneshot.plan import plan
    from llmc_attnmask.oneshot.prune import prune
    from llmc_attnmask.report.conversion import pack, unpack

__all__ = [
    "ALPSPruningModifier",
    "ActivationSmoothingModifier",
    "AttentionMatrixPruningModifier",
    "MaskedGPTQModifier",
    "MaskedRecoveryModifier",
    "evaluate",
    "inspect",
    "load",
    "pack",
    "plan",
    "prune",
    "unpack",
]

_HOMES = {
    "ALPSPruningModifier": "llmc_attnmask.modifiers",
    "ActivationSmoothingModifier": "llmc_attnmask.modifiers",
    "AttentionMatrixPruningModifier": "llmc_attnmask.modifiers",
    "MaskedGPTQModifier": "llmc_attnmask.modifiers",
    "MaskedRecoveryModifier": "llmc_attnmask.modifiers",
    "evaluate": "llmc_attnmask.evaluation.perplexity",
    "inspect": "llmc_attnmask.checkpoint.inspect",
    "load": "llmc_attnmask.checkpoint.load",
    "pack": "llmc_attnmask.report.conversion",
    "plan": "llmc_attnmask.oneshot.plan",
    "prune": "llmc_attnmask.oneshot.prune",
    "unpack": "llmc_attnmask.report.conversion",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


import_with_llm_compressor("llmc_attnmask.modifiers")
