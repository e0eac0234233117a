import pytest
import torch

from llmc_attnmask.serving.kernels import activations, cusparselt, packing, select
from llmc_attnmask.serving.kernels.op import sparse_linear
from tests.support.interpreter import interpreted
from tests.support.kernels import dense
from tests.support.kernels.matrices import DTYPES, random_2of4, random_values

pytest.importorskip("triton")
pytestmark = interpreted


def _arguments(dtype: torch.dtype, tokens: int = 3) -> tuple:
    torch.manual_seed(0)
    out_dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    values, indices = packing.pack(random_2of4(32, 64, dtype))
    scale = token_scale = None
    x = random_values((tokens, 64), out_dtype)
    if dtype.itemsize == 1:
        scale = torch.rand(32)
        x, token_scale = activations.reference(x, dtype)
    bias = torch.randn(32, dtype=out_dtype)
    forms = (values, indices, None, None, 1)
    return x, *forms, scale, token_scale, bias, select.NO_LIMIT, out_dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_is_a_valid_custom_operator(dtype):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype == torch.float8_e4m3fn:
        checks.remove("test_schema")  # it does arithmetic on the arguments
    torch.library.opcheck(sparse_linear, _arguments(dtype), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_eight_bits_with_scales_give_sixteen_bits(dtype):
    x, values, indices, _, _, _, scale, token_scale, bias, *_ = arguments = _arguments(
        dtype
    )
    found = sparse_linear(*arguments)
    assert x.dtype == dtype and found.dtype == torch.bfloat16
    expected = dense.linear(x, values, indices, scale, token_scale, bias, torch.float32)
    # the interpreter truncates bfloat16 where a GPU rounds
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_no_tokens_give_an_empty_result(dtype):
    found = sparse_linear(*_arguments(dtype, tokens=0))
    assert found.shape == (0, 32) and found.dtype == torch.bfloat16


def test_one_compiled_graph_serves_every_number_of_tokens():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, *rest: sparse_linear(x, *rest), backend=backend)
    x, *rest = _arguments(torch.bfloat16, tokens=7)
    torch._dynamo.mark_dynamic(x, 0)
    assert torch.equal(compiled(x, *rest), sparse_linear(x, *rest))
    y = x[:5].clone()
    assert torch.equal(compiled(y, *rest), sparse_linear(y, *rest))
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_token_of_zeros_and_a_large_token_survive_quantization(dtype):
    x = torch.tensor([[0.0, 0.0], [60000.0, -30000.0]], dtype=torch.float16)
    rounded, scale = activations.quantizer(dtype, x.device)(x)
    back = rounded.float() * scale[:, None]
    assert not back[0].any()
    torch.testing.assert_close(back[1], x[1].float(), rtol=0.04, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("width", [40, 44])  # the library may need more than 9/16
def test_kept_values_of_a_compressed_matrix_are_its_first_half(dtype, width):
    compressed = torch.arange(32 * width).to(dtype).view(32, -1)
    kept = cusparselt.kept_values(compressed, 64)
    assert kept.shape == (32, 32)
    assert torch.equal(kept.flatten(), compressed.flatten()[: 32 * 32])
    assert kept.data_ptr() == compressed.data_ptr()
