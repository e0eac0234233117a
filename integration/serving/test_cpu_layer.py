"""Layers on CPU kernels give what vLLM's own kernels give for the same weight."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import init_int8_linear_kernel
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors import (
    compressed_tensors,
    schemes,
)

from llmc_attnmask.serving import rival
from llmc_attnmask.serving.cpu_layer import CpuLayer, Rows, merged
from llmc_attnmask.serving.cpu_packing import CpuPacking, _packed
from llmc_attnmask.serving.dense_twin import DenseTwin
from llmc_attnmask.serving.kernels.cpu import machine
from llmc_attnmask.serving.kernels.select import NO_LIMIT, Choice

PARTS = [Rows(0, 48, "2:4"), Rows(48, 80, "unstructured"), Rows(80, 96, "dense")]
COLUMNS = 128
SPARSE = Choice("avx512", "avx512", NO_LIMIT, "wanted")

pytestmark = pytest.mark.skipif(
    machine.lacks(machine.flags(), torch.int8, two_of_four=False) is not None,
    reason="this machine cannot run the kernels",
)


@pytest.fixture(autouse=True)
def default_dtype() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does for a bf16 model
    yield
    torch.set_default_dtype(torch.float32)
    gc.collect()  # vLLM's handles of weights cannot be released in a fake tensor mode


def mixed_weight(dtype: torch.dtype) -> Tensor:
    weight = torch.randn(PARTS[-1].last, COLUMNS) * 30
    weight[:48].view(-1, 4)[:, 1:3] = 0
    weight[48:80][torch.rand(32, COLUMNS) < 0.6] = 0
    return weight.round().clamp(-127, 127).to(dtype)


def int8_layer(static: bool, symmetric: bool) -> Any:
    layer: Any = nn.Module()
    layer.scheme = schemes.CompressedTensorsW8A8Int8("channel", static, symmetric)
    layer.scheme.kernel = init_int8_linear_kernel(
        is_channelwise=True,
        is_static_input_scheme=static,
        input_symmetric=symmetric,
        module_name="test",
    )
    for name, value in (
        ("input_scale", torch.tensor([0.03], dtype=torch.float32) if static else None),
        (
            "input_zero_point",
            None if symmetric or not static else torch.tensor([-17], dtype=torch.int8),
        ),
    ):
        layer.register_parameter(
            name, None if value is None else nn.Parameter(value, requires_grad=False)
        )
    return layer


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("bias", [None, torch.randn(96).bfloat16()])
def test_a_bf16_layer_of_three_structures(tokens: int, bias: Tensor | None) -> None:
    weight, stock = mixed_weight(torch.bfloat16), UnquantizedLinearMethod()
    packed = [_packed(weight, rows, None) for rows in PARTS]
    served = CpuLayer(nn.Module(), stock, packed, None)
    expected = DenseTwin(nn.Module(), stock, weight.clone(), None)
    x = torch.randn(tokens, COLUMNS)
    torch.testing.assert_close(
        served.multiply(None, x, bias), expected(x, bias), rtol=2**-7, atol=0.1
    )


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bias", [None, torch.randn(96).bfloat16()])
def test_an_int8_layer_with_every_scheme_of_activations(
    static: bool, symmetric: bool, bias: Tensor | None
) -> None:
    weight, layer = mixed_weight(torch.int8), int8_layer(static, symmetric)
    stock = compressed_tensors.CompressedTensorsLinearMethod(None)
    scale = torch.rand(len(weight), dtype=torch.float32) * 0.01 + 0.01
    packed = [_packed(weight, rows, None) for rows in PARTS]
    served = CpuLayer(layer, stock, packed, scale)
    expected = DenseTwin(layer, stock, weight.clone(), scale)
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, COLUMNS) + 0.3
        torch.testing.assert_close(
            served.multiply(None, x, bias), expected(x, bias), rtol=2**-7, atol=0.01
        )


def test_neighbors_of_the_same_structure_are_one_part() -> None:
    assert merged([4, 2, 2], ["2:4", "2:4", "dense"]) == [
        Rows(0, 6, "2:4"),
        Rows(6, 8, "dense"),
    ]
    # q, k and v in one tensor of the checkpoint
    assert merged([4, 2, 2], ["unstructured"]) == [Rows(0, 8, "unstructured")]
    assert merged([4, 2, 2], ["2:4", "dense"]) == [Rows(0, 8, "unstructured")]


def loading_layer() -> Any:
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(96, COLUMNS), requires_grad=False)

    def load(param: nn.Parameter, loaded_weight: Tensor, shard: int) -> None:
        rows = PARTS[shard]
        param.data[rows.first : rows.last] = loaded_weight

    layer.weight.weight_loader = load
    return layer


def packing_of(layer: Any) -> CpuPacking:
    stock = UnquantizedLinearMethod()
    return CpuPacking("qkv_proj", layer, stock, PARTS, 3, lambda _: SPARSE)


def load(layer: Any, loader: Any, weight: Tensor) -> None:
    for shard in (2, 0, 1):
        rows = PARTS[shard]
        assert layer.weight.numel() == weight.numel()
        loader(layer.weight, weight[rows.first : rows.last], shard)


def test_the_dense_weight_is_released_when_its_last_part_arrives() -> None:
    layer, weight = loading_layer(), mixed_weight(torch.bfloat16)
    packing = packing_of(layer)
    load(layer, layer.weight.weight_loader, weight)
    assert layer.weight.numel() == 0
    assert packing.choice.reason == (
        "2:4 (48 rows) and unstructured (32 rows) and dense (16 rows)"
    )
    served = packing.serve()
    x = torch.randn(2, COLUMNS)
    torch.testing.assert_close(
        served.multiply(layer, x, None), x @ weight.T, rtol=2**-7, atol=0.1
    )


def test_a_part_that_is_not_2of4_as_config_json_says_is_refused() -> None:
    layer, weight = loading_layer(), mixed_weight(torch.bfloat16)
    weight[7, 4:8] = 1
    packing_of(layer)
    with pytest.raises(ValueError, match=r"qkv_proj is 2:4 according to config\.json"):
        load(layer, layer.weight.weight_loader, weight)


def test_reloaded_weights_are_packed_again() -> None:
    layer = loading_layer()
    packing = packing_of(layer)
    loader = layer.weight.weight_loader
    x = torch.randn(2, COLUMNS)
    for seed in range(2):
        torch.manual_seed(seed)
        weight = mixed_weight(torch.bfloat16)
        # vLLM first counts the entries on the meta device, then loads them
        counted = nn.Parameter(torch.zeros(96, COLUMNS, device="meta"), False)
        loader(param=counted, loaded_weight=weight[80:96], shard=2)
        layer.weight = nn.Parameter(torch.zeros(96, COLUMNS), requires_grad=False)
        load(layer, loader, weight)
        assert packing.choice == packing.choice
        served = packing.serve()
        torch.testing.assert_close(
            served.multiply(layer, x, None), x @ weight.T, rtol=2**-7, atol=0.1
        )


def test_a_layer_that_stays_dense_keeps_its_reloaded_weight() -> None:
    layer, weight = loading_layer(), mixed_weight(torch.bfloat16)
    packing = packing_of(layer)
    packing.keep_dense()
    load(layer, layer.weight.weight_loader, weight)
    assert torch.equal(layer.weight, weight)


def test_a_comparison_settles_those_that_it_implies() -> None:
    won, lost = rival.Timed(1.5, 0.6), rival.Timed(0.8, 0.9)
    assert [won.settles(size) for size in (0.5, 0.62, 0.7)] == [True, True, False]
    assert [lost.settles(size) for size in (0.8, 0.88, 1.0)] == [False, True, True]
