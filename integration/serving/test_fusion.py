"""vLLM's compiler fuses the quantization of tokens with the preceding norm.

The tests run on the CPU, up to the graph for which the compiler would generate code.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.ir.ops
from methods import two_of_four
from torch import Tensor, fx
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.pattern_matcher import PatternMatcherPass
from vllm.compilation.passes.inductor_pass import enable_fake_mode
from vllm.compilation.passes.utility.noop_elimination import NoOpEliminationPass
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8

from llmc_attnmask.serving.gpu_layer import GpuLayer
from llmc_attnmask.serving.kernels import activations, packing, select
from llmc_attnmask.serving.linear import SparseLinearMethod

GPU = torch.device("cuda")  # its calls are made here on CPU tensors
ROWS, COLUMNS = 32, 64
EPSILON = 1e-6
OURS = "llmc_attnmask.sparse_linear.default"
PER_TOKEN = "dynamic_per_token_scaled_fp8_quant"
FUSED = "rms_norm_dynamic_per_token_quant"
KERNEL, FORMULA = ["none", "+quant_fp8"], ["none"]  # what QuantFP8 traces as
# of vLLM's CUDA builds 0.26 and 0.33; the CPU build has none of these, or a stub
SCHEMAS = (
    f"{PER_TOKEN}(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
    "rms_norm_static_fp8_quant(Tensor! result, Tensor input, Tensor weight, "
    "Tensor scale, float epsilon) -> ()",
    "fused_add_rms_norm_static_fp8_quant(Tensor! result, Tensor input, "
    "Tensor! residual, Tensor weight, Tensor scale, float epsilon) -> ()",
    f"{FUSED}(Tensor! result, Tensor input, Tensor weight, Tensor! scale, "
    "float epsilon, Tensor? scale_ub, Tensor!? residual) -> ()",
)


class Stop(Exception):  # noqa: N818 - not an error: no code is to be generated
    """Raised in Inductor once the graph has been seen."""


@pytest.fixture(scope="module", autouse=True)
def _cuda_operators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Operators with the CUDA build's schemas, which never run."""
    library = torch.library.Library("stand_in", "DEF")
    with pytest.MonkeyPatch.context() as patch:
        # what Inductor leaves behind when it is stopped
        cache = tmp_path_factory.mktemp("inductor")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        for schema in SCHEMAS:
            name = schema.partition("(")[0]
            library.define(schema)
            torch.library.register_fake(f"stand_in::{name}", lambda *_, **__: None)
            stand_in = getattr(torch.ops.stand_in, name)
            patch.setattr(torch.ops._C, name, stand_in, raising=False)
        patch.setattr(QuantFP8, "forward_cpu", QuantFP8.forward_cuda)
        yield
    library._destroy()


@pytest.fixture
def configured(request: pytest.FixtureRequest) -> Iterator[VllmConfig]:
    """vLLM's configuration, with the ``custom_ops`` of the parameter."""
    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=request.param))
    with set_current_vllm_config(config):
        yield config


def _layer(dtype: torch.dtype) -> tuple[SparseLinearMethod, Any]:
    """Return a method as a GPU would have it after loading, and its layer."""
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS).to(dtype)
    weight.view(torch.int8).view(-1, 4)[:, :2] = 0
    values, indices = packing.pack(weight)
    method = two_of_four("layer")
    method.served = GpuLayer(select.NO_LIMIT)
    method.served.quantize = activations.quantizer(dtype, GPU)
    layer = SimpleNamespace(
        weight_packed=values,
        weight_indices=indices,
        weight_arrived=None,
        weight_cusparselt=None,
        weight_channel_scale=torch.rand(ROWS),
    )
    return method, layer


def _compiled(function: Callable, passes: list[Callable[[fx.Graph], object]]) -> str:
    """Return a function's graph after Inductor's passes and then vLLM's.

    :param function: of tokens, other tokens and the weight of a norm
    """
    graphs = []

    def run_passes(graph: fx.Graph) -> None:
        for each in passes:
            each(graph)
        graphs.append(str(graph))
        raise Stop

    settings = {
        "post_grad_custom_post_pass": run_passes,
        "enable_auto_functionalized_v2": False,  # as vLLM sets it
        "force_disable_caches": True,
    }
    x = torch.randn(7, COLUMNS, dtype=torch.bfloat16)
    weight = torch.ones(COLUMNS, dtype=torch.bfloat16)
    torch._dynamo.reset()
    with inductor.patch(settings), pytest.raises(Exception, match="Stop"):
        torch.compile(function, backend=compile_fx, fullgraph=True)(
            x, x.clone(), weight
        )
    assert len(graphs) == 1
    return graphs[0]


@enable_fake_mode
def _per_token_patterns() -> PatternMatcherPass:
    """Return the patterns of vLLM's RMSNormQuantFusionPass with one scale per token."""
    from vllm.compilation.passes.fusion import rms_quant_fusion

    patterns = PatternMatcherPass()
    for kind in (
        rms_quant_fusion.FusedAddRMSNormDynamicQuantPattern,
        rms_quant_fusion.RMSNormDynamicQuantPattern,
    ):
        kind(EPSILON, rms_quant_fusion.FP8_DTYPE).register(patterns)
    return patterns


@pytest.mark.parametrize("configured", [KERNEL, FORMULA], indirect=True, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_vllm_fuses_fp8_with_the_preceding_norm(
    configured: VllmConfig, residual: bool
) -> None:
    method, layer = _layer(torch.float8_e4m3fn)

    def block(x: Tensor, added: Tensor, norm: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not residual:
            return method.apply(layer, vllm.ir.ops.rms_norm(x, norm, EPSILON))
        normed, total = vllm.ir.ops.fused_add_rms_norm(x, added, norm, EPSILON)
        return method.apply(layer, normed), total

    noop = NoOpEliminationPass(configured)
    patterns = _per_token_patterns()
    before = _compiled(block, [noop])
    after = _compiled(block, [noop, patterns.apply])
    assert FUSED not in before and before.count(OURS) == 1
    assert "rms_norm.default" in before
    assert (PER_TOKEN in before) == (configured.compilation_config.custom_ops == KERNEL)
    assert after.count(FUSED) == after.count(OURS) == 1
    assert PER_TOKEN not in after and "amax" not in after


@pytest.mark.parametrize("configured", [FORMULA], indirect=True, ids=str)
def test_int8_is_quantized_by_vllms_operator_outside_the_sparse_one(
    configured: VllmConfig,
) -> None:
    method, layer = _layer(torch.int8)

    def block(x: Tensor, _: Tensor, norm: Tensor) -> Tensor:
        return method.apply(layer, vllm.ir.ops.rms_norm(x, norm, EPSILON))

    graph = _compiled(block, [NoOpEliminationPass(configured)])
    quantized, ours = graph.index("_C.dynamic_scaled_int8_quant"), graph.index(OURS)
    assert graph.index("rms_norm.default") < quantized < ours
    assert graph.count("aten.clone") == 0  # the tokens are contiguous already
