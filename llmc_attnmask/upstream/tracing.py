"""Correct llm-compressor's tracer, with which some models lose their causal mask.

The traced graphs of Mistral, Mixtral, Phi-3, Qwen3-MoE, Starcoder2 and others call the
mask function with a rebuilt config. llm-compressor 0.14.0.1 rebuilds it without the
attention implementation, for which transformers then creates no mask, and the model is
calibrated with every token attending to all tokens after it, too.
"""

import functools
from typing import Any

from llmcompressor.pipelines.sequential.helpers import SequentialTracer
from torch.fx import Node
from transformers import PretrainedConfig


def keep_attention_implementation() -> None:
    """Keep the attention implementation in the configs of traced graphs.

    Further calls have no effect.
    """
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
