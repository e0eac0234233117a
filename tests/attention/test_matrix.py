from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from llmc_attnmask.attention import softmax
from llmc_attnmask.attention.capture import AttentionCall, AttentionReplica
from llmc_attnmask.attention.matrix import (
    attention_context,
    attention_error,
    attention_norms,
    probe_gradients,
)
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.evaluation.attention_error import attention_inputs
from llmc_attnmask.evaluation.perplexity import load_model
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.attention import probabilities
from tests.support.memory import PeakMemory

B, H, G, L, DH, D = 2, 4, 2, 13, 8, 24


def random_call(window: int | None = None, **changes) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    visible = torch.ones(L, L, dtype=torch.bool).tril()
    if window:
        visible &= ~torch.ones(L, L, dtype=torch.bool).tril(-window)
    mask = torch.zeros(1, 1, L, L, dtype=torch.float64)
    mask.masked_fill_(~visible, torch.finfo(torch.float32).min)
    call = AttentionCall(
        query=normal(B, H, L, DH) * 2,
        key=normal(B, G, L, DH),
        value=normal(B, G, L, DH),
        mask=mask,
        scaling=DH**-0.5,
    )
    return replace(call, **changes)


CALLS = {
    "causal": random_call(),
    "bidirectional": random_call(mask=None),
    "padding, one mask row": random_call(
        mask=torch.zeros(B, 1, 1, L).index_fill_(3, torch.tensor([0, 11]), -1e38)
    ),
    "sliding window": random_call(window=4),
    "soft cap": random_call(softcap=1.5),
    "sinks": random_call(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]).double()),
}


def _blind(rows: list[int]) -> torch.Tensor:
    """Return a causal mask in which ``rows`` see no key."""
    visible = torch.ones(L, L, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, L, L, dtype=torch.float64)
    mask.masked_fill_(~visible, -torch.inf)
    mask[..., rows, :] = -torch.inf
    return mask


_PADDED = _blind([])
_PADDED[..., 2, :] = torch.finfo(torch.float32).min
_PADDED[..., 2, 5:] = -torch.inf
BLIND = {  # masks of -inf, as in some models
    "causal": _blind([]),
    "one row": _blind([5]),
    "the first rows": _blind([0, 1, 2]),
    "all rows but one": _blind([i for i in range(L) if i != 9]),
    "of which one row is padding": _PADDED,
}


def by_autograd(call, query, key, matrix_weight, output_weight, output_projection):
    """Compute the error naively, with full matrices."""
    change = probabilities(replace(call, query=query, key=key)) - probabilities(call)
    value = call.value.repeat_interleave(H // G, dim=1)
    reached = (change @ value).transpose(1, 2).flatten(2) @ output_projection.T
    return matrix_weight * change.square().sum() + (
        output_weight * reached.square().sum()
    )


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("rows_at_once", [L, 3])
def test_error_and_closed_form_gradient_equal_autograd(
    call, weights, rows_at_once, monkeypatch
):
    monkeypatch.setitem(softmax._BLOCK_ELEMENTS, "cpu", B * H * L * rows_at_once)
    torch.manual_seed(1)
    output_projection = torch.randn(D, H * DH, dtype=torch.float64)
    pruned = [
        (x + 0.3 * torch.randn_like(x)).requires_grad_() for x in (call.query, call.key)
    ]
    ours = attention_error(
        call,
        *pruned,
        matrix_weight=weights[0],
        output_weight=weights[1],
        output_projection=output_projection,
    )
    expected = by_autograd(call, *pruned, *weights, output_projection)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for found, correct in zip(
        torch.autograd.grad(ours, pruned),
        torch.autograd.grad(expected, pruned),
        strict=True,
    ):
        assert (found - correct).norm() <= 1e-9 * correct.norm()


def test_gradient_of_the_masks_equals_autograd_through_rope_and_gqa(random_llama):
    attention = random_llama.model.layers[0].self_attn
    inputs = ModuleInputs()
    handle = attention.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(args, kwargs), with_kwargs=True
    )
    random_llama(torch.arange(2 * L).view(2, L))
    handle.remove()
    replica = AttentionReplica(attention, dtype=torch.float64)
    args, kwargs = inputs.batch([0, 1], replica.device, replica.dtype)
    dense = {
        f"{p}_proj.weight": replica.module.get_parameter(f"{p}_proj.weight").detach()
        for p in "qk"
    }
    torch.manual_seed(2)
    masks = {n: torch.rand_like(w).requires_grad_() for n, w in dense.items()}
    reference = replica(args, kwargs)
    pruned = replica(args, kwargs, {n: masks[n] * w for n, w in dense.items()})

    ours = attention_error(reference, pruned.query, pruned.key)
    expected = (probabilities(pruned) - probabilities(reference)).square().sum()
    found = torch.autograd.grad(ours, list(masks.values()), retain_graph=True)
    correct = torch.autograd.grad(expected, list(masks.values()))
    for f, w in zip(found, correct, strict=True):
        assert w.norm() > 0
        assert (f - w).norm() <= 1e-9 * w.norm()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_norms_equal_the_full_matrices(call):
    output_projection = torch.randn(D, H * DH, dtype=torch.float64)
    norms = attention_norms(call, output_projection)
    full = probabilities(call)
    value = call.value.repeat_interleave(H // G, dim=1)
    output = (full @ value).transpose(1, 2).flatten(2) @ output_projection.T
    assert norms.matrix == pytest.approx(full.square().sum().item(), rel=1e-12)
    assert norms.output == pytest.approx(output.square().sum().item(), rel=1e-12)


def test_a_query_that_sees_no_key_counts_as_the_model_computes_it():
    mask = torch.zeros(1, 1, L, L, dtype=torch.float64)
    mask[..., :3, :] = torch.finfo(torch.float32).min  # left padding
    call = random_call(mask=mask)
    query = call.query * 1.1
    expected = probabilities(replace(call, query=query)) - probabilities(call)
    error = attention_error(call, query, call.key)
    torch.testing.assert_close(error, expected.square().sum())


@pytest.mark.parametrize("mask", BLIND.values(), ids=BLIND.keys())
@pytest.mark.parametrize("sinks", [False, True])
def test_an_all_infinite_row_adds_no_error_and_no_gradient(mask, sinks):
    call = random_call(mask=mask, sinks=CALLS["sinks"].sinks if sinks else None)
    blind = (mask == -torch.inf).all(-1).flatten()
    assert not probabilities(call)[:, :, blind].any()
    torch.manual_seed(1)
    projection = torch.randn(D, H * DH, dtype=torch.float64)
    weights = {"matrix_weight": 0.3, "output_weight": 0.7}
    found = []
    for rows in (torch.arange(L), torch.arange(L)[~blind]):
        part = replace(call, query=call.query[:, :, rows], mask=mask[:, :, rows])
        pruned = [x.detach().mul(1.1).requires_grad_() for x in (part.query, part.key)]
        error = attention_error(part, *pruned, **weights, output_projection=projection)
        found.append([error, *torch.autograd.grad(error, pruned)])
    (error, to_query, to_key), (expected, from_query, from_key) = found
    assert error.item() == pytest.approx(expected.item(), rel=1e-12)
    assert not to_query[:, :, blind].any()
    torch.testing.assert_close(to_query[:, :, ~blind], from_query)
    torch.testing.assert_close(to_key, from_key)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("rows_at_once", [L, 3])
def test_the_context_is_what_o_reads_and_its_gradient_equals_autograd(
    call, rows_at_once, monkeypatch
):
    monkeypatch.setitem(softmax._BLOCK_ELEMENTS, "cpu", B * H * L * rows_at_once)
    value = call.value.clone().requires_grad_()
    wide = value.repeat_interleave(H // G, dim=1)
    expected = (probabilities(call) @ wide).transpose(1, 2).flatten(2)
    found = attention_context(call, value)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, value, upstream)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_probe_gradients_reproduce_the_errors_curvature(call):
    """E[(g . u)^2] equals the error of a small change u, for any u."""
    torch.manual_seed(3)
    output_projection = torch.randn(D, H * DH, dtype=torch.float64)
    weights = {"matrix_weight": 0.7, "output_weight": 0.3}
    weights["output_projection"] = output_projection
    generator = torch.Generator().manual_seed(0)
    probes = [probe_gradients(call, generator, **weights) for _ in range(600)]
    for i, name in enumerate(("query", "key")):
        change = 1e-4 * torch.randn_like(getattr(call, name))
        moved = replace(call, **{name: getattr(call, name) + change})
        error = attention_error(call, moved.query, moved.key, **weights)
        predicted = sum((p[i] * change).sum() ** 2 for p in probes) / len(probes)
        assert predicted.item() == pytest.approx(error.item(), rel=0.25)


def test_output_weight_needs_the_output_projection():
    call = CALLS["causal"]
    with pytest.raises(ValueError, match="output_projection"):
        attention_error(call, call.query, call.key, output_weight=1.0)


def peak_bytes(model: PreTrainedModel, length: int) -> int:
    """Peak memory of one sample's error and gradient, beyond what existed before."""
    tokens = torch.arange(length).view(1, length) % 2048
    name, inputs = next(iter(attention_inputs(model, tokens).items()))
    replica = AttentionReplica(model.get_submodule(name))
    weight = replica.module.get_parameter("q_proj.weight")
    changed = (0.9 * weight).requires_grad_()
    output_projection = replica.module.get_parameter("o_proj.weight")
    with PeakMemory() as memory:
        args, kwargs = inputs.batch([0], replica.device, replica.dtype)
        with torch.no_grad():
            reference = replica(args, kwargs)
        pruned = replica(args, kwargs, {"q_proj.weight": changed})
        attention_error(
            reference,
            pruned.query,
            pruned.key,
            output_weight=1.0,
            output_projection=output_projection,
        ).backward()
    assert changed.grad is not None and changed.grad.any()
    return memory.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_grows_no_faster_than_the_sequence(dtype):
    model = load_model(MODEL_DIR).to(dtype)
    assert peak_bytes(model, 4096) <= 4.5 * peak_bytes(model, 1024)
