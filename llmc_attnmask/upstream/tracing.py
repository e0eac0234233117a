"""A correction to llm-compressor's tracer, without which some models forget the future
is hidden.

Mistral, Mixtral, Phi-3, Qwen3-MoE, Starcoder2 and others call their mask function in a
way that ends up in the traced graph, with a config built anew. llm-compressor 0.14.0.1
builds it without the attention implementation, for which transformers then makes no
mask: the model is calibrated with every token attending to all that follow.
"""

import functools
from typing import Any

from llmcompressor.pipelines.sequential.helpers import SequentialTracer
from torch.fx import Node
from transformers import PretrainedConfig


def keep_attention_implementation() -> None:
    """Let configs in traced graphs keep it; safe to call again."""
    create_arg = SequentialTracer.create_arg
    if hasattr(create_arg, "__wrapped__"):
        return

    @functools.wraps(create_arg)
    def corrected(self: SequentialTracer, a: Any) -> Any:
        made = create_arg(self, a)
        if isinstance(a, PretrainedConfig) and isinstance(made, Node):
            implementation = {"attn_implementation": a._attn_implementation}
            made.kwargs = {**made.kwargs, **implementation}
        return made

    SequentialTracer.create_arg = corrected  # type: ignore[method-assign]
