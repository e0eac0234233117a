"""Quantize tokens to 8 bits symmetrically, with one scale per token, as in W8A8."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantizer(dtype: torch.dtype, device: torch.device) -> Quantizer:
    """Return the function that quantizes a served layer's tokens, outside its operator.

    On a GPU it makes the same calls as vLLM's W8A8 layers, so that vLLM's compiler
    passes fuse them with the preceding norm in the same way. Create it while vLLM's
    configuration is set, as it is when a model is loaded: the configuration decides
    whether ``QuantFP8`` runs its kernel or a formula that Inductor can fuse.

    :param dtype: int8 or float8_e4m3fn
    :param device: where the tokens will be
    :return: a function of tokens [tokens, K] in 16 bits that returns [tokens, K] in
        ``dtype`` and scales fp32 [tokens]
    """
    if device.type != "cuda":
        return partial(reference, dtype=dtype)
    return _int8_of_vllm if dtype == torch.int8 else _fp8_of_vllm()


def _int8_of_vllm(x: Tensor) -> tuple[Tensor, Tensor]:
    from vllm import _custom_ops as ops

    rounded, scale, _ = ops.scaled_int8_quant(x.contiguous())
    return rounded, scale.view(-1)


def _fp8_of_vllm() -> Quantizer:
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    quantize = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)

    def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
        rounded, scale = quantize(x)
        return rounded, scale.view(-1)

    return per_token


def reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round to nearest, with each token's largest entry at the end of the range.

    This is plain torch, for any device.

    :param x: [tokens, K] in 16 or 32 bits
    :param dtype: int8 or float8_e4m3fn
    :return: [tokens, K] in ``dtype``, and scales fp32 [tokens]
    """
    largest = _LARGEST[dtype]
    scale = x.float().abs().amax(dim=-1, keepdim=True) / largest
    scale.clamp_min_(torch.finfo(torch.float32).tiny)
    scaled = (x.float() / scale).clamp(-largest, largest)
    rounded = scaled.round() if dtype == torch.int8 else scaled
    return rounded.to(dtype), scale.view(-1)
