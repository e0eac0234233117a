import pytest
import torch

from integration.paper.experiment import BASELINES, measure, synthetic
from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.matrix import attention_error
from llmc_attnmask.paper.algorithm import projected_gradient_descent, threshold
from llmc_attnmask.paper.problem import FusedProblem, causal_attention


@pytest.fixture(params=["light", "heavy"])
def problem(request) -> FusedProblem:
    inputs, weight = synthetic(24, 12, request.param, seed=0)
    return FusedProblem(inputs, weight, l2_penalty=1e-3)


def test_attention_is_causal_and_its_rows_sum_to_one(problem):
    attention = causal_attention(problem.inputs, problem.weight)
    assert not attention.triu(1).any()
    torch.testing.assert_close(attention.sum(-1), torch.ones(24).double())


def test_the_closed_form_gradient_equals_autograd(problem):
    mask = torch.rand_like(problem.weight).requires_grad_()
    (expected,) = torch.autograd.grad(problem.loss(mask), mask)
    loss, found = problem.loss_and_gradient(mask.detach())
    assert loss.item() == pytest.approx(problem.loss(mask).item(), rel=1e-12)
    assert (found - expected).norm() <= 1e-9 * expected.norm()


def test_the_fused_loss_equals_the_package_loss_with_q_as_x_w_and_k_as_x(problem):
    """What the modifier minimizes, on one head without rotary embedding."""
    x, w = problem.inputs, problem.weight
    causal = torch.full((24, 24), -1e300, dtype=torch.float64).triu(1)

    def heads(rows: torch.Tensor) -> torch.Tensor:
        return rows[None, None]

    reference = AttentionCall(
        heads(x @ w), heads(x), heads(x), heads(causal), scaling=1.0
    )
    mask = torch.rand_like(w).requires_grad_()
    ours = attention_error(reference, heads(x @ (mask * w)), heads(x)) / 2
    penalty = problem.l2_penalty / 2 * mask.square().sum()
    torch.testing.assert_close(ours + penalty, problem.loss(mask))
    (gradient,) = torch.autograd.grad(ours + penalty, mask)
    _, expected = problem.loss_and_gradient(mask.detach())
    assert (gradient - expected).norm() <= 1e-9 * expected.norm()


def test_descent_never_rises_stays_in_the_box_and_its_pl_ratio_is_bounded(problem):
    descent = projected_gradient_descent(problem, 800)
    losses = torch.tensor(descent.losses)
    assert (losses.diff() <= 0).all()
    assert losses[-1] < 0.9 * losses[0]
    assert descent.mask.min() >= 0 and descent.mask.max() <= 1
    ratios = descent.pl_ratios(descent.losses[-1])
    assert min(ratios) > 0.1 * problem.l2_penalty


def test_threshold_prunes_exactly_the_smallest():
    mask = torch.arange(16.0).view(4, 4)
    assert threshold(mask, 0.25).flatten().tolist() == [False] * 4 + [True] * 12
    assert int((~threshold(torch.ones(5, 5), 0.5)).sum()) == 12


def test_every_method_is_measured_at_every_sparsity():
    rows = list(measure(64, 32, "light", seed=0))
    assert {row.method for row in rows} == {*BASELINES, "attention matrix"}
    at = {(r.method, r.sparsity): r.error for r in rows}
    for method in BASELINES:
        assert at[method, 0.3] < at[method, 0.9]
    assert at["attention matrix", 0.8] < min(at[m, 0.8] for m in BASELINES)


def test_mismatched_shapes_are_refused():
    with pytest.raises(ValueError, match=r"weight is \(3, 3\); expected \(2, 2\)"):
        FusedProblem(torch.zeros(5, 2), torch.zeros(3, 3), 0.0)
