"""``GPTQModifier`` quantizes with another function than its own.

It looks ``quantize_weight`` up in its module whenever it quantizes, so that is where
the other function is put.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llmcompressor.modifiers.gptq import base as stock


@contextmanager
def quantizing_with(quantize_weight: Callable[..., Any]) -> Iterator[None]:
    """Within, ``GPTQModifier`` calls this function.

    :param quantize_weight: with the parameters and results of llm-compressor's own
    """
    original = stock.quantize_weight
    stock.quantize_weight = quantize_weight
    try:
        yield
    finally:
        stock.quantize_weight = original
