"""vLLM's compressed-tensors configuration, extended by sparse layers.

Written for vLLM 0.26, 0.32 and 0.33.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors import (
    compressed_tensors,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.serving.linear import SparseLinearMethod
from llmc_attnmask.serving.recognise import METHOD, SPARSITY, Sparsity, recognise
from llmc_attnmask.serving.table import KernelTable

logger = init_logger(__name__)


class SparseConfig(compressed_tensors.CompressedTensorsConfig):
    """The stock configuration of every layer, and which of the layers are sparse.

    It also serves unquantized checkpoints, for which the stock class has no groups.
    """

    sparsity: Sparsity
    table: KernelTable

    def get_name(self) -> str:
        return METHOD

    @classmethod
    def override_quantization_method(
        cls,
        hf_quant_cfg: Mapping[str, Any],
        user_quant: str | None,
        hf_config: Any = None,
    ) -> str | None:
        return METHOD if recognise(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SparseConfig":
        sparsity = recognise(config)
        if sparsity is None:
            raise ValueError(
                f"quantization {METHOD} was requested, but config.json names no "
                "sparse layers; omit --quantization"
            )
        stock = {  # without keys that the stock class refuses or does not know
            key: value
            for key, value in config.items()
            if key not in (SPARSITY, marker.KEY)
        }
        made: SparseConfig = super().from_config(stock)
        made.sparsity = sparsity
        made.table = KernelTable()
        return made

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)

        def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(
                name
                if name.startswith("re:") or "." not in name
                else hf_to_vllm_mapper._map_name(name) or name
                for name in names
            )

        self.sparsity = replace(
            self.sparsity,
            packed=renamed(self.sparsity.packed),
            two_of_four=renamed(self.sparsity.two_of_four),
            unstructured=renamed(self.sparsity.unstructured),
            ignore=renamed(self.sparsity.ignore),
        )

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return self._linear_method(layer, prefix)
        self._refuse_packed(layer, prefix)
        if self.target_scheme_map or self.kv_cache_scheme:
            return super().get_quant_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return super().get_quant_method(layer, prefix)
        return None  # as if there were no quantization

    def _linear_method(self, layer: LinearBase, prefix: str) -> QuantizeMethodBase:
        stock = super().get_quant_method(layer, prefix)
        parts = self._parts(prefix)
        if not any(map(self.sparsity.is_sparse, parts)):
            return stock
        self.table.expect(prefix)
        return SparseLinearMethod(
            stock,
            name=prefix,
            storage=self.sparsity.storage,
            packed_parts=sum(map(self.sparsity.is_packed, parts)),
            structures=[self.sparsity.structure(part) for part in parts],
            table=self.table,
        )

    def _parts(self, prefix: str) -> list[str]:
        """Return the checkpoint's names of the layers that vLLM fuses into this one."""
        parent, dot, kind = prefix.rpartition(".")
        kinds = self.packed_modules_mapping.get(kind, [kind])
        return [parent + dot + part for part in kinds]

    def _refuse_packed(self, layer: torch.nn.Module, prefix: str) -> None:
        if isinstance(layer, RoutedExperts):
            packed = self.sparsity.is_packed(prefix) or any(
                target.startswith(f"{prefix}.") for target in self.sparsity.packed
            )
        else:  # class names and patterns mean linear layers, which vLLM's head is not
            packed = isinstance(layer, ParallelLMHead) and (
                prefix in self.sparsity.packed
            )
        if packed:
            raise ValueError(
                f"{prefix} is stored packed, which is supported only for linear "
                "layers, not for experts or output embeddings; store the checkpoint "
                "dense: llmc-attnmask unpack DIR OUT"
            )
