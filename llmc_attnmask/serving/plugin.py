"""Entry point of vLLM's plugin group ``vllm.general_plugins``.

vLLM calls ``register`` in each of its processes, possibly more than once.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from llmc_attnmask.serving.recognise import METHOD, QUANTIZATION, annotate
from llmc_attnmask.serving.versions import refusal

logger = logging.getLogger("vllm.llmc_attnmask")  # vLLM's handlers and level


def register() -> None:
    """Let this process's vLLM serve this package's sparse checkpoints.

    Other checkpoints are served as before.

    In an unsupported version, nothing is changed and the log says why.
    """
    import vllm

    reason = refusal(vllm.__version__)
    if reason is not None:
        logger.warning("llmc-attnmask is off: %s", reason)
        return
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )
    from vllm.transformers_utils.config import HFConfigParser

    from llmc_attnmask.serving.config import SparseConfig

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(SparseConfig)
    if not hasattr(HFConfigParser.parse, "__wrapped__"):
        HFConfigParser.parse = _annotating(HFConfigParser.parse)


def _annotating(parse: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's config parser so that it annotates what it parsed.

    For an unquantized checkpoint that is stored dense this is the only entry point:
    without a quantization_config, vLLM asks no plugin about it.
    """

    @functools.wraps(parse)
    def parsed(*args: Any, **kwargs: Any) -> Any:
        content, config = parse(*args, **kwargs)
        if annotate(content):
            config.quantization_config = content[QUANTIZATION]
        return content, config

    return parsed
