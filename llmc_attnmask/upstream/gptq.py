"""Let ``GPTQModifier`` quantize with another function than its own.

It looks up ``quantize_weight`` in its module whenever it quantizes, so the other
function is put there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llmcompressor.modifiers.gptq import base as stock


@contextmanager
def quantizing_with(quantize_weight: Callable[..., Any]) -> Iterator[None]:
    """Let ``GPTQModifier`` call this function within the block.

    :param quantize_weight: has the parameters and results of llm-compressor's own
    """
    original = stock.quantize_weight
    stock.quantize_weight = quantize_weight
    try:
        yield
    finally:
        stock.quantize_weight = original
