"""Prune a language model's attention by learning the masks that keep softmax(QK^T).

Importing the package registers its modifiers with llm-compressor, where that is
installed; a serving environment does without it.
"""

from importlib.util import find_spec

__version__ = "0.1.0.dev0"

if find_spec("llmcompressor"):
    from llmc_attnmask.modifiers import (
        AttentionMatrixPruningModifier as AttentionMatrixPruningModifier,
    )
