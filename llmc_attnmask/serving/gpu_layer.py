"""A 2:4 layer on a GPU: its tensors, and the call of its kernels."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config

from llmc_attnmask.serving.kernels import (
    activations,
    cusparselt,
    forms,
    op,
    self_check,
)
from llmc_attnmask.serving.kernels.select import Choice
from llmc_attnmask.serving.scales import by_row


class UnfitError(Exception):
    """The kernels refuse a layer or fail on it; the message is the reason."""


class GpuLayer:
    """Multiplies by the tensors that it has registered on a vLLM layer."""

    def __init__(self, few_tokens: int, span: int = 1) -> None:
        """
        :param few_tokens: as in ``op.sparse_linear``
        :param span: of the decode kernel's metadata
        """
        self.few_tokens = few_tokens
        self.span = span
        self.quantize: activations.Quantizer | None = None  # of 8-bit layers
        self.nbytes = 0  # of the weight's forms

    @classmethod
    def of(cls, layer: Any, choice: Choice) -> "GpuLayer":
        """Replace a layer's dense weight by the forms that the chosen kernels read.

        :raises UnfitError: with the layer unchanged
        """
        weight = layer.weight.data
        try:
            made = forms.make(weight, choice, _largest_step())
        except (cusparselt.CuSparseLtError, torch.OutOfMemoryError) as refusal:
            raise UnfitError(str(refusal).splitlines()[0]) from refusal
        scale = None
        if weight.itemsize == 1:
            scale = by_row(layer.weight_scale.data, layer.logical_widths)
        if wrong := self_check.failure(
            weight, made, scale, choice.tokens, layer.params_dtype
        ):
            raise UnfitError(f"{choice.label} failed its check: {wrong}")
        served = cls(choice.tokens, made.span)
        if weight.itemsize == 1:
            served.quantize = activations.quantizer(weight.dtype, weight.device)
        found = (made.values, made.indices, made.arrived, made.compressed)
        memory = [x.untyped_storage() for x in found if x is not None]
        # values may lie within the compressed form
        served.nbytes = sum({x.data_ptr(): x.nbytes() for x in memory}.values())
        for name in ("weight", "weight_scale", "input_scale"):
            if hasattr(layer, name):
                delattr(layer, name)
        for name, tensor in (
            # LoRA reads the device from a parameter of this name
            ("weight_packed", made.compressed if made.values is None else made.values),
            ("weight_indices", made.indices),
            ("weight_arrived", made.arrived),
            ("weight_cusparselt", made.compressed),
            ("weight_channel_scale", scale),
        ):
            layer.register_parameter(
                name,
                None if tensor is None else Parameter(tensor, requires_grad=False),
            )
        return served

    def multiply(self, layer: Any, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """
        :param tokens: [tokens, K] in 16 bits
        :return: [tokens, rows]
        """
        dtype, token_scale = tokens.dtype, None
        if self.quantize is not None:  # outside the operator, so that vLLM can fuse it
            tokens, token_scale = self.quantize(tokens)
        return op.sparse_linear(
            tokens,
            None if layer.weight_indices is None else layer.weight_packed,
            layer.weight_indices,
            layer.weight_arrived,
            layer.weight_cusparselt,
            self.span,
            layer.weight_channel_scale,
            token_scale,
            bias,
            self.few_tokens,
            dtype,
        )

    def __str__(self) -> str:
        return f"span {self.span}"


def _largest_step() -> int:
    """Return the most tokens that vLLM multiplies at once."""
    largest: int = get_current_vllm_config().scheduler_config.max_num_batched_tokens
    return largest
