"""Some rows of a vLLM layer on the kernel that vLLM itself would give them.

They are the rival that a sparse kernel has to beat, and they serve the dense parts of a
fused layer.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase


class DenseTwin(nn.Module):
    """A copy of some rows of a layer, processed by the layer's stock method."""

    def __init__(
        self, layer: Any, stock: LinearMethodBase, weight: Tensor, scale: Tensor | None
    ) -> None:
        """
        :param layer: not processed yet
        :param weight: [rows, K], some rows of the layer's, in any memory
        :param scale: float32 [rows], of an int8 weight
        """
        super().__init__()
        self.stock = stock
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        self.logical_widths = [len(weight)]
        if scale is not None:
            self.scheme = copy(layer.scheme)
            self.scheme.kernel = copy(layer.scheme.kernel)  # which keeps the weight
            self.weight_scale = nn.Parameter(scale.view(-1, 1), requires_grad=False)
            for name in ("input_scale", "input_zero_point"):
                given = getattr(layer, name, None)
                own = None
                if given is not None:
                    own = nn.Parameter(given.data.clone(), requires_grad=False)
                self.register_parameter(name, own)
            self.register_parameter("azp_adj", None)
        stock.process_weights_after_loading(self)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """
        :param x: [tokens, K] in 16 bits
        :return: [tokens, rows]
        """
        # vLLM's scheme changes a bias that it finds on the layer; this one has none
        return self.stock.apply(self, x, bias)


def input_quantization(
    layer: Any, stock: LinearMethodBase
) -> tuple[Tensor | None, Tensor | None]:
    """Return an int8 layer's static scale and zero point, as vLLM would use them.

    :return: float32 and int32 scalars; None where they are computed for every token
    """
    few = torch.zeros(16, 64, dtype=torch.int8)
    twin = DenseTwin(layer, stock, few, torch.ones(len(few), dtype=torch.float32))
    scale: Tensor | None = twin.input_scale  # type: ignore[assignment]
    zero_point: Tensor | None = twin.input_zero_point  # type: ignore[assignment]
    return scale, zero_point
