import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import (
    quantize_weight as stock_quantize_weight,
)

from llmc_attnmask.solvers import gptq
from llmc_attnmask.solvers.gptq import quantize_weight

ROWS, COLUMNS = 24, 64
SCHEMES = {
    "W4 group": {"num_bits": 4, "strategy": "group", "group_size": 16},
    "W4 group asymmetric": {
        "num_bits": 4,
        "strategy": "group",
        "group_size": 16,
        "symmetric": False,
    },
    "W8 channel": {"num_bits": 8, "strategy": "channel"},
    "W4 channel asymmetric": {"num_bits": 4, "strategy": "channel", "symmetric": False},
    "W8 tensor": {"num_bits": 8, "strategy": "tensor"},
    "FP8 channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "FP8 tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "FP8 block": {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": [8, 16],
    },
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_order = pytest.mark.parametrize("order", [None, "static", "weight"])


def problem(scheme: str, order: str | None, batch: int, sparse: list[int]) -> dict:
    """Weights, some of them 2:4, correlated inputs, and scales as set by observers."""
    torch.manual_seed(0)
    args = QuantizationArgs(**SCHEMES[scheme], actorder=order)
    weights = torch.randn(batch, ROWS, COLUMNS) + 0.1
    for index in sparse:
        groups = weights[index].view(-1, 4)
        lowest = groups.abs().argsort(dim=1)[:, :2]
        groups.scatter_(1, lowest, 0.0)
    mixing = torch.randn(batch, COLUMNS, COLUMNS) * torch.rand(COLUMNS) + torch.eye(
        COLUMNS
    )
    inputs = torch.randn(batch, 256, COLUMNS) @ mixing
    low, high = extremes(weights, args)
    scale, zero_point = calculate_qparams(low, high, args)
    return {
        "weights": weights,
        "hessians": inputs.mT @ inputs,
        "scale": scale,
        "zero_point": zero_point,
        "global_scale": None,
        "quant_args": args,
        "blocksize": 16,
        "percdamp": 0.01,
    }


def extremes(weights: torch.Tensor, args: QuantizationArgs):
    batch = len(weights)
    match args.strategy:
        case "tensor":
            parts = weights.view(batch, 1, -1)
        case "channel":
            parts = weights.view(batch, ROWS, 1, -1)
        case "group":
            parts = weights.view(batch, ROWS, -1, args.group_size)
        case "block":
            height, width = args.block_structure
            parts = weights.view(
                batch, ROWS // height, height, COLUMNS // width, width
            ).transpose(2, 3)
            parts = parts.flatten(3)
    return parts.amin(-1), parts.amax(-1)


def run(function, given: dict):
    tensors = {k: v.clone() if torch.is_tensor(v) else v for k, v in given.items()}
    return function(**tensors)


def error(quantized: torch.Tensor, given: dict) -> float:
    difference = quantized - given["weights"]
    return float(((difference @ given["hessians"]) * difference).sum())


@every_scheme
@every_order
@pytest.mark.parametrize("batch", [1, 3])
def test_weights_without_zeros_are_quantized_as_by_stock_gptq_bit_for_bit(
    scheme, order, batch
):
    given = problem(scheme, order, batch, sparse=[])
    for ours, theirs in zip(
        run(quantize_weight, given), run(stock_quantize_weight, given), strict=True
    ):
        assert torch.equal(ours, theirs)


@every_scheme
@every_order
def test_zeros_stay_positive_zeros_and_other_weights_are_on_the_grid(scheme, order):
    given = problem(scheme, order, 1, sparse=[0])
    pruned = given["weights"] == 0
    quantized, losses, fallback = run(quantize_weight, given)
    assert not quantized[pruned].view(torch.int32).any()
    assert losses.shape == fallback.shape == (1,) and not fallback.any()
    assert (quantized != 0).sum() > 0.7 * (~pruned).sum()
    # rounding to the nearest value changes nothing
    nearest = dict(given, weights=quantized, hessians=torch.eye(COLUMNS)[None])
    assert torch.equal(run(stock_quantize_weight, nearest)[0], quantized)


@every_scheme
def test_the_error_is_below_that_of_remasked_stock_gptq_and_of_rounding(scheme):
    given = problem(scheme, "static", 1, sparse=[0])
    masked = error(run(quantize_weight, given)[0], given)
    stock = run(stock_quantize_weight, given)[0]
    remasked = stock.masked_fill(given["weights"] == 0, 0.0)
    assert masked < 0.8 * error(remasked, given)
    nearest = dict(given, hessians=torch.eye(COLUMNS)[None])
    assert masked < 0.8 * error(run(stock_quantize_weight, nearest)[0], given)


def test_every_sweep_of_the_descent_lowers_the_error(monkeypatch):
    given = problem("W4 group", "static", 1, sparse=[0])
    errors = []
    for sweeps in range(5):
        monkeypatch.setattr(gptq, "_SWEEPS", sweeps)
        errors.append(float(run(quantize_weight, given)[1]))
    assert errors == sorted(errors, reverse=True)
    assert errors[4] < 0.95 * errors[0]


def test_sparse_and_dense_weights_may_share_a_batch():
    given = problem("W8 channel", "static", 4, sparse=[1, 2])
    quantized, losses, fallbacks = run(quantize_weight, given)
    assert losses.shape == fallbacks.shape == (4,)
    for index in range(4):
        alone = {
            k: v[index : index + 1] if torch.is_tensor(v) else v
            for k, v in given.items()
        }
        expected, loss, _ = run(quantize_weight, alone)
        assert torch.equal(quantized[index], expected[0])
        torch.testing.assert_close(losses[index], loss[0])


def test_inputs_that_are_always_zero_get_zero_weights_as_in_stock_gptq():
    given = problem("W8 channel", "static", 1, sparse=[0])
    given["hessians"][:, 5] = 0
    given["hessians"][:, :, 5] = 0
    assert not run(quantize_weight, given)[0][..., 5].any()
    assert not run(stock_quantize_weight, given)[0][..., 5].any()


def test_a_hessian_that_cannot_be_inverted_leads_to_rounding_to_nearest():
    given = problem("W8 channel", None, 1, sparse=[0])
    given["hessians"] = -given["hessians"]
    quantized, _, fallback = run(quantize_weight, given)
    assert fallback.all()
    nearest = dict(given, hessians=torch.eye(COLUMNS)[None])
    assert torch.equal(quantized, run(stock_quantize_weight, nearest)[0])
