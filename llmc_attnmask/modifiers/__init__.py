"""The modifiers, registered with llm-compressor so that recipes can name them."""

from llmcompressor.modifiers.factory import ModifierFactory

from llmc_attnmask.modifiers.alps_pruning import ALPSPruningModifier
from llmc_attnmask.modifiers.attention_pruning import AttentionMatrixPruningModifier
from llmc_attnmask.modifiers.masked_recovery import MaskedRecoveryModifier

__all__ = [
    "ALPSPruningModifier",
    "AttentionMatrixPruningModifier",
    "MaskedRecoveryModifier",
]

for _modifier in (
    ALPSPruningModifier,
    AttentionMatrixPruningModifier,
    MaskedRecoveryModifier,
):
    ModifierFactory.register(_modifier.__name__, _modifier)
