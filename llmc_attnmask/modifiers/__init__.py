"""The modifiers, registered with llm-compressor so that recipes can name them.

Importing this module also installs the mask guard, which checks every modifier of a
run, and a correction to llm-compressor's tracer (both in ``upstream/``).
"""

from llmcompressor.modifiers.factory import ModifierFactory

from llmc_attnmask.modifiers.activation_smoothing import ActivationSmoothingModifier
from llmc_attnmask.modifiers.alps_pruning import ALPSPruningModifier
from llmc_attnmask.modifiers.attention_pruning import AttentionMatrixPruningModifier
from llmc_attnmask.modifiers.masked_gptq import MaskedGPTQModifier
from llmc_attnmask.modifiers.masked_recovery import MaskedRecoveryModifier
from llmc_attnmask.upstream.mask_guard import install
from llmc_attnmask.upstream.tracing import keep_attention_implementation

__all__ = [
    "ALPSPruningModifier",
    "ActivationSmoothingModifier",
    "AttentionMatrixPruningModifier",
    "MaskedGPTQModifier",
    "MaskedRecoveryModifier",
]

for _modifier in (
    ALPSPruningModifier,
    ActivationSmoothingModifier,
    AttentionMatrixPruningModifier,
    MaskedGPTQModifier,
    MaskedRecoveryModifier,
):
    ModifierFactory.register(_modifier.__name__, _modifier)

install()
keep_attention_implementation()
