"""A vLLM linear layer whose weight is sparse.

Written for vLLM 0.26, 0.32 and 0.33.
"""

from collections.abc import Sequence
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

from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask
from llmc_attnmask.serving import made_up
from llmc_attnmask.serving.cpu_layer import CpuLayer, Rows, Structure, merged
from llmc_attnmask.serving.cpu_packing import CpuPacking, not_two_of_four
from llmc_attnmask.serving.gpu_layer import GpuLayer, UnfitError
from llmc_attnmask.serving.kernels import select
from llmc_attnmask.serving.kernels.cpu import machine as cpu
from llmc_attnmask.serving.loading import ShardLoader
from llmc_attnmask.serving.table import KernelTable, Row


@register_weight_loader_v2_supported_method
class SparseLinearMethod(LinearMethodBase):
    """Loads a layer with its stock method, then serves it on a sparse kernel.

    Where that is impossible or not worthwhile, the layer goes back to its stock method.
    """

    def __init__(
        self,
        stock: LinearMethodBase,
        *,
        name: str,
        storage: str,
        packed_parts: int,
        structures: Sequence[Structure],
        table: KernelTable,
    ) -> None:
        """
        :param stock: the method that the layer would have if it were stored dense
        :param storage: of the layer's packed parts, as config.json calls it
        :param packed_parts: how many parts that are
        :param structures: of the layer's parts
        """
        self.stock = stock
        self.name = name
        self.storage = storage
        self.packed_parts = packed_parts
        self.structures = structures
        self.table = table
        self.loader: ShardLoader | None = None
        self.widths: list[int] = []  # rows of every part, on this rank
        self.columns = 0  # on this rank
        self.cpu: CpuPacking | None = None
        self.served: GpuLayer | CpuLayer | None = None  # until then by the stock method

    @property
    def rows(self) -> int:
        """The rows on this rank."""
        return sum(self.widths)

    @property
    def supports_pre_processed_weights(self) -> bool:
        """Refuse vLLM's weight cache, which alone asks for this.

        It consists of ``vllm preload`` and of engines that take another process's
        weights from GPU memory as they are.

        :raises ValueError: always
        """
        raise ValueError(
            f"{self.name} is sparse, and every process prepares its weights for the "
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
        self.widths = list(output_partition_sizes)
        self.columns = input_size_per_partition
        self.stock.create_weights(
            layer, input_size_per_partition, output_partition_sizes, *args, **kwargs
        )
        if select.Machine.detect().device == "cpu":
            self.cpu = CpuPacking(
                *(self.name, layer, self.stock),
                *(self._parts(), len(self.widths), self._choose),
            )
        if not self.packed_parts:
            return
        weight = getattr(layer, "weight", None)
        storable = (*select.DTYPES, torch.float32)
        if weight is None or weight.ndim != 2 or weight.dtype not in storable:
            raise ValueError(
                f"{self.name} is stored as {self.storage}, which holds weights of 8, "
                "16 or 32 bits, but is quantized in another way; pack the checkpoint "
                "again"
            )
        self.loader = ShardLoader(
            self.name,
            self.storage,
            self.packed_parts,
            weight,
            lambda dense, shard: layer.weight.weight_loader(
                layer.weight, dense, *(() if shard is None else (shard,))
            ),
        )
        dtypes = {"compressed": weight.dtype, "bitmask": torch.uint8}
        for part in self.loader.parts:
            # empty, because the loader takes what the checkpoint has under this name
            empty = torch.empty(0, dtype=dtypes.get(part, torch.int64))
            parameter = Parameter(empty, requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self.loader.loader(part)})
            layer.register_parameter(part, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.loader is not None:
            if not _dummy_weights():
                self.loader.check_complete()
            for part in self.loader.parts:
                delattr(layer, part)
        choice = self._serve(layer)
        self._log(choice)
        self._tell_compile_cache(choice)
        if self.served is None:
            if self.cpu is not None:
                self.cpu.keep_dense()
            self.stock.process_weights_after_loading(layer)
            layer.quant_method = self.stock

    def _serve(self, layer: Any) -> select.Choice:
        """Replace the dense weight by its sparse forms, where a kernel takes them."""
        choice = self.cpu.choice if self.cpu else self._choose(layer)
        if not choice.sparse:
            return choice
        if choice.few == "avx512":
            assert self.cpu is not None
            self.served = self.cpu.serve()
            return choice
        try:
            self.served = GpuLayer.of(layer, choice)
        except UnfitError as reason:
            return select.keep_dense(str(reason))
        return choice

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert self.served is not None
        out = self.served.multiply(layer, x.reshape(-1, x.shape[-1]), bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _choose(self, layer: Any) -> select.Choice:
        weight = getattr(layer, "weight", None)
        if weight is None or weight.shape != (self.rows, self.columns):
            return select.keep_dense("no sparse kernel for this quantization")
        described = select.Layer(
            self.rows,
            self.columns,
            weight.dtype,
            all(structure == "2:4" for structure in self.structures),
            self._activations(layer),
            layer.params_dtype,
        )
        choice = select.choose(described, select.Machine.detect(), select.forced())
        if getattr(layer, "_cpu_skip_gemm_dispatch", False):
            return select.keep_dense("vLLM reads its weight elsewhere")
        # the weight is read only if the layer would be sparse
        if choice.sparse and _dummy_weights():
            self._make_up(weight.data)
            return replace(choice, reason=f"{choice.reason}; {made_up.NOTE}")
        # packing for a CPU checks its parts; other kernels need all parts to be 2:4
        whole = choice.sparse and choice.few != "avx512"
        if whole and sparse_24_bitmask.crowded_groups(weight.data):
            raise not_two_of_four(self.name)
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
            return "8-bit"
        return "8-bit per token"

    def _parts(self) -> list[Rows]:
        parts = merged(self.widths, self.structures)
        if len(parts) > 1 and cpu.unmeasured(select.Machine.detect().flags):
            # vLLM's dense kernels for AMX expect a whole layer
            return merged(self.widths, ["unstructured"])
        return parts

    def _make_up(self, weight: Tensor) -> None:
        for rows in self._parts():
            if rows.structure != "dense":
                made_up.prune(weight[rows.first : rows.last], rows.structure)

    def _log(self, choice: select.Choice) -> None:
        if get_tensor_model_parallel_rank():
            return
        shape = f"{self.rows} x {self.columns}"
        kind = self.name.rpartition(".")[2]
        storage = self.storage if self.packed_parts else "dense"
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
            kernels[self.name] = f"{choice.label}, {self.served}"


def _dummy_weights() -> bool:
    """Return whether vLLM uses random weights instead of reading the checkpoint's."""
    return get_current_vllm_config().load_config.load_format == "dummy"
