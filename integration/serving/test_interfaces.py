"""The internals of vLLM that the plugin depends on; a failure shows what changed."""

import inspect
from collections.abc import Callable

import pytest
import torch
from methods import two_of_four
from torch import nn
from vllm import _custom_ops
from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.compressed_tensors import (
    compressed_tensors,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Fp8,
    CompressedTensorsW8A8Int8,
)
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    kFp8DynamicTokenSym,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import set_weight_attrs
from vllm.transformers_utils.config import HFConfigParser

from llmc_attnmask.serving.config import SparseConfig
from llmc_attnmask.serving.kernels import activations, select
from llmc_attnmask.serving.linear import SparseLinearMethod

GPU = torch.device("cuda")  # its calls are made here on CPU tensors
Stock = compressed_tensors.CompressedTensorsConfig
Method = linear.LinearMethodBase


@pytest.mark.parametrize(
    ("function", "passed"),
    [
        (Method.create_weights, "self layer input_size_per_partition "
         "output_partition_sizes input_size output_size params_dtype"),
        (Method.apply, "self layer x bias"),
        (Method.process_weights_after_loading, "self layer"),
        (linear.register_weight_loader_v2_supported_method, "cls"),
        (Stock.get_name, "self"),
        (Stock.from_config, "config"),
        (Stock.override_quantization_method, "hf_quant_cfg user_quant hf_config"),
        (Stock.apply_vllm_mapper, "self hf_to_vllm_mapper"),
        (Stock.get_quant_method, "self layer prefix"),
        (WeightsMapper._map_name, "self key"),
        (set_weight_attrs, "weight weight_attrs"),
        (register_quantization_config, "quantization"),
        (get_current_vllm_config, ""),
        (get_tensor_model_parallel_rank, ""),
        (HFConfigParser.parse, "self model trust_remote_code"),
        (_custom_ops.scaled_int8_quant, "input"),
        (QuantFP8.__init__, "self static group_shape"),
        (QuantFP8.forward_native, "self x"),
        (QuantFP8.forward_cuda, "self x"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)  # fmt: skip
def test_functions_take_what_the_plugin_passes(function: Callable, passed: str) -> None:
    """Names are the same, and there are no further required parameters."""
    found = list(inspect.signature(function).parameters.values())
    names = passed.split()
    assert [parameter.name for parameter in found][: len(names)] == names
    for other in found[len(names) :]:
        variable = other.kind in (other.VAR_POSITIONAL, other.VAR_KEYWORD)
        assert variable or other.default is not other.empty, other


def test_overridden_methods_are_called_as_before() -> None:
    for name in ("get_name", "from_config", "apply_vllm_mapper", "get_quant_method"):
        ours = inspect.signature(getattr(SparseConfig, name)).parameters
        assert list(ours) == list(inspect.signature(getattr(Stock, name)).parameters)


def test_attributes_that_the_plugin_reads_exist() -> None:
    config = VllmConfig()
    assert config.load_config.load_format == "auto"
    assert isinstance(QUANTIZATION_METHODS, list)
    assert SparseLinearMethod.__name__ in linear.WEIGHT_LOADER_V2_SUPPORTED
    assert "shard_id" in inspect.getsource(WeightsMapper)  # on loaded tensors
    for scheme, names in (
        (CompressedTensorsW8A8Int8, ("is_static_input_scheme", "input_symmetric")),
        (CompressedTensorsW8A8Fp8, ("is_static_input_scheme", "weight_block_size")),
    ):
        code = inspect.getsource(scheme)
        assert all(f"self.{name} = " in code for name in names)
        assert "layer.logical_widths = " in code
    assert "self.params_dtype = " in inspect.getsource(linear.LinearBase)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_vllm_quantizes_tokens_like_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    with set_current_vllm_config(VllmConfig()):
        rounded, scale = activations.quantizer(dtype, GPU)(x)
    expected, expected_scale = activations.reference(x, dtype)
    assert rounded.dtype == dtype and scale.dtype == torch.float32
    torch.testing.assert_close(scale, expected_scale)
    apart = (rounded.float() - expected.float()).abs()
    one_step = 1 if dtype == torch.int8 else expected.float().abs() / 8
    assert (apart <= one_step).all()
    assert (apart > 0).float().mean() < 0.02  # halves, rounded to either side


def test_sparse_layers_get_no_tokens_that_are_already_quantized() -> None:
    """If vLLM ever fuses tokens' scales into activations, the plugin must follow."""
    fused = pytest.importorskip(
        "vllm.model_executor.layers.fusion.fused_act_quant", reason="not before 0.32"
    )
    assert kFp8DynamicTokenSym not in {key for _, key in fused._FUSED_ACT_QUANT}
    assert kFp8DynamicTokenSym.scale.group_shape == GroupShape.PER_TOKEN


def test_the_weight_cache_is_refused_with_advice() -> None:
    cache = pytest.importorskip(
        "vllm.model_executor.model_loader.weight_cache.protocol",
        reason="not before 0.32",
    )
    model = nn.Module()
    model.q_proj = nn.Module()
    model.q_proj.quant_method = two_of_four("q_proj")
    with pytest.raises(
        ValueError, match=r"q_proj is sparse.*without --load-format ipc"
    ):
        cache.check_ipc_quant_support(model)


def test_a_compiled_graph_is_reused_only_with_the_kernels_it_was_made_for() -> None:
    config = VllmConfig()
    hashes = set()
    with set_current_vllm_config(config):
        for kernel in ("dense", "cuda", "cusparselt", "cuda"):
            method = two_of_four("layer")
            method._tell_compile_cache(select.Choice(kernel, kernel, 0, ""))
            hashes.add(config.compute_hash())
    assert len(hashes) == 3
