"""A vLLM linear layer whose weight is 2:4.

Written for vLLM 0.26, 0.32 and 0.33.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Fp8,
    CompressedTensorsW8A8Int8,
)
from vllm.model_executor.utils import set_weight_attrs

from llmc_attnmask.checkpoint import layout
from llmc_attnmask.serving import made_up
from llmc_attnmask.serving.kernels import (
    activations,
    cusparselt,
    forms,
    op,
    select,
    self_check,
)
from llmc_attnmask.serving.loading import PARTS, ShardLoader
from llmc_attnmask.serving.table import KernelTable, Row


@register_weight_loader_v2_supported_method
class Sparse24LinearMethod(LinearMethodBase):
    """Loads a layer with its stock method, then serves it on a sparse kernel.

    Where that is impossible or not worthwhile, the layer goes back to its stock method.
    """

    def __init__(
        self,
        stock: LinearMethodBase,
        *,
        name: str,
        packed_parts: int,
        all_sparse: bool,
        table: KernelTable,
    ) -> None:
        """
        :param stock: the method that the layer would have if it were stored dense
        :param packed_parts: how many of the layer's parts the checkpoint stores packed
        :param all_sparse: whether all of the layer's parts are 2:4
        """
        self.stock = stock
        self.name = name
        self.packed_parts = packed_parts
        self.all_sparse = all_sparse
        self.table = table
        self.loader: ShardLoader | None = None
        self.few_tokens = 0
        self.span = 1  # of the decode kernel's metadata
        self.quantize: activations.Quantizer | None = None  # of 8-bit layers
        self.rows = self.columns = 0  # of this rank's part

    @property
    def supports_pre_processed_weights(self) -> bool:
        """Refuse vLLM's weight cache, which alone asks for this.

        It consists of ``vllm preload`` and of engines that take another process's
        weights from GPU memory as they are.

        :raises ValueError: always
        """
        raise ValueError(
            f"{self.name} is 2:4, and every process prepares its weights for the "
            "sparse kernels itself; serve it without --load-format ipc_cache and "
            "without vllm preload"
        )

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.rows = sum(output_partition_sizes)
        self.columns = input_size_per_partition
        self.stock.create_weights(
            layer, input_size_per_partition, output_partition_sizes, *args, **kwargs
        )
        if not self.packed_parts:
            return
        weight = getattr(layer, "weight", None)
        storable = (*select.DTYPES, torch.float32)
        if weight is None or weight.ndim != 2 or weight.dtype not in storable:
            raise ValueError(
                f"{self.name} is stored as {layout.NAME}, which holds weights of 8, "
                "16 or 32 bits, but is quantized in another way; pack the checkpoint "
                "again"
            )
        self.loader = ShardLoader(
            self.name,
            self.packed_parts,
            weight.device,
            lambda dense, shard: layer.weight.weight_loader(
                layer.weight, dense, *(() if shard is None else (shard,))
            ),
        )
        dtypes = (weight.dtype, torch.uint8, torch.int64)
        for part, dtype in zip(PARTS, dtypes, strict=True):
            # empty, because the loader takes what the checkpoint has under this name
            parameter = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self.loader.loader(part)})
            layer.register_parameter(part, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.loader is not None:
            if not _dummy_weights():
                self.loader.check_complete()
            for part in PARTS:
                delattr(layer, part)
        choice = self._choose(layer)
        if choice.sparse:
            choice = self._to_sparse(layer, choice)
        self._log(choice)
        self._tell_compile_cache(choice)
        if not choice.sparse:
            self.stock.process_weights_after_loading(layer)
            layer.quant_method = self.stock

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        tokens, token_scale = x.reshape(-1, x.shape[-1]), None
        if self.quantize is not None:  # outside the operator, so that vLLM can fuse it
            tokens, token_scale = self.quantize(tokens)
        out = op.sparse_linear(
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
            x.dtype,
        )
        return out.view(*x.shape[:-1], out.shape[-1])

    def _choose(self, layer: Any) -> select.Choice:
        weight = getattr(layer, "weight", None)
        if weight is None or weight.shape != (self.rows, self.columns):
            return select.keep_dense("no sparse kernel for this quantization")
        described = select.Layer(
            self.rows,
            self.columns,
            weight.dtype,
            self.all_sparse,
            self._activations(layer),
        )
        choice = select.choose(described, select.Machine.detect(), select.forced())
        # the weight is read only if the layer would be sparse
        if choice.sparse and _dummy_weights():
            made_up.prune(weight.data)
            return replace(choice, reason=f"{choice.reason}; {made_up.NOTE}")
        if choice.sparse and layout.crowded_groups(weight.data):
            raise ValueError(
                f"{self.name} is 2:4 according to config.json, but its weights are "
                f"not; prune the model again, or serve it with {select.VARIABLE}=dense"
            )
        return choice

    def _activations(self, layer: Any) -> Any:
        if layer.params_dtype == torch.float32:
            return "other"
        if isinstance(self.stock, UnquantizedLinearMethod):
            return "16-bit"
        scheme = getattr(layer, "scheme", None)
        if isinstance(scheme, CompressedTensorsW8A8Int8):
            simple = scheme.input_symmetric
        elif isinstance(scheme, CompressedTensorsW8A8Fp8):
            simple = scheme.weight_block_size is None
        else:
            return "other"
        if not simple or scheme.is_static_input_scheme:
            return "other"
        return "8-bit per token"

    def _to_sparse(self, layer: Any, choice: select.Choice) -> select.Choice:
        """Replace the dense weight, unless the kernels fail on it.

        :return: the given choice, or dense with the reason
        """
        self.few_tokens = choice.tokens
        weight = layer.weight.data
        try:
            made = forms.make(weight, choice, _largest_step())
        except (cusparselt.CuSparseLtError, torch.OutOfMemoryError) as refusal:
            return select.keep_dense(str(refusal).splitlines()[0])
        scale = None
        if weight.itemsize == 1:
            scale = _by_row(layer.weight_scale.data, layer.logical_widths)
        if wrong := self_check.failure(
            weight, made, scale, self.few_tokens, layer.params_dtype
        ):
            return select.keep_dense(f"{choice.label} failed its check: {wrong}")
        self.span = made.span
        if weight.itemsize == 1:
            self.quantize = activations.quantizer(weight.dtype, weight.device)
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
        return choice

    def _log(self, choice: select.Choice) -> None:
        if get_tensor_model_parallel_rank():
            return
        shape = f"{self.rows} x {self.columns}"
        kind = self.name.rpartition(".")[2]
        storage = "packed" if self.packed_parts else "dense"
        self.table.add(
            self.name,
            Row(kind, shape, storage, choice.label, choice.reason),
        )

    def _tell_compile_cache(self, choice: select.Choice) -> None:
        """Make vLLM's compile cache depend on the layer's kernels.

        A cached graph expects the tensors of the kernels that it was compiled for, so
        other kernels need another graph. vLLM's cache key includes this dictionary.
        """
        settings = get_current_vllm_config().additional_config
        if isinstance(settings, dict):  # on CUDA it is
            kernels = settings.setdefault("llmc_attnmask", {})
            kernels[self.name] = f"{choice.label}, span {self.span}"


def _dummy_weights() -> bool:
    """Return whether vLLM uses random weights instead of reading the checkpoint's."""
    return get_current_vllm_config().load_config.load_format == "dummy"


def _largest_step() -> int:
    """Return the most tokens that vLLM multiplies at once."""
    largest: int = get_current_vllm_config().scheduler_config.max_num_batched_tokens
    return largest


def _by_row(scale: Tensor, widths: list[int]) -> Tensor:
    """Expand scales, given per row or per part of the fused layer, to fp32 [rows]."""
    if scale.numel() == len(widths) != sum(widths):
        counts = torch.tensor(widths, device=scale.device)
        scale = scale.view(-1).repeat_interleave(counts)
    return scale.float().reshape(-1).contiguous()
