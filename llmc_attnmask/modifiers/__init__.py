"""The modifiers, registered with llm-compressor so that recipes can name them."""

from llmcompressor.modifiers.factory import ModifierFactory

from llmc_attnmask.modifiers.attention_pruning import AttentionMatrixPruningModifier

__all__ = ["AttentionMatrixPruningModifier"]

for _modifier in (AttentionMatrixPruningModifier,):
    ModifierFactory.register(_modifier.__name__, _modifier)
