"""Fields and checks that several modifiers share."""

from typing import Annotated

import torch
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from pydantic import BeforeValidator
from torch import Tensor, nn

from llmc_attnmask.upstream.mask_guard import modifiers_before


def _quoted(value: object) -> object:
    if isinstance(value, int):  # YAML 1.1 reads 2:4 as a number in base 60
        raise ValueError('write it in quotes, "N:M", as YAML reads 2:4 as a number')
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


MaskStructureField = Annotated[str, BeforeValidator(_quoted)]
Names = Annotated[list[str], BeforeValidator(_as_list)]


def check_before_quantization(modifier: Modifier) -> None:
    """Refuse a modifier that would change rounded weights.

    :raises ValueError: if it comes after a quantization in the recipe
    """
    for earlier in modifiers_before(modifier):
        if isinstance(earlier, QuantizationMixin):
            raise ValueError(
                f"{type(modifier).__name__} comes after {type(earlier).__name__} and "
                "would change rounded weights; put it before that"
            )


def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or infinite parameters.

    :raises ValueError: naming the first such parameter
    """
    for prefix, module in model.named_modules():
        # scales that are not calibrated yet hold whatever was in memory
        quantized = hasattr(module, "quantization_scheme")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.element_size() == 1 or not parameter.is_floating_point():
                continue  # already quantized
            if quantized and name not in ("weight", "bias"):
                continue
            if not _all_finite(parameter):
                bad = int((~parameter.isfinite()).sum())
                raise ValueError(
                    f"{prefix}.{name} has {bad} NaN or infinite entries; repair the "
                    "checkpoint first"
                )


def _all_finite(tensor: Tensor) -> bool:
    """Test the extremes alone, which are NaN if any entry is: this is far faster."""
    if not tensor.numel():
        return True
    return bool(torch.stack(tensor.detach().aminmax()).isfinite().all())
