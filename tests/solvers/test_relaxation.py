import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc_attnmask.solvers.relaxation import soft_top_k


@given(
    entries=st.integers(2, 40),
    share=st.floats(0, 1),
    temperature=st.floats(0.01, 10),
    scale=st.floats(0.001, 100),
    seed=st.integers(0, 99),
)
def test_rows_sum_to_the_number_kept(entries, share, temperature, scale, seed):
    kept = min(entries - 1, max(1, round(share * entries)))
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(5, entries, generator=generator, dtype=torch.float64)
    relaxed = soft_top_k(scores, kept, temperature)
    assert (relaxed >= 0).all() and (relaxed <= 1).all()
    assert relaxed.sum(-1) == pytest.approx(torch.full((5,), kept), rel=1e-3)


@given(st.integers(1, 5))
def test_equal_scores_give_a_uniform_mask(kept):
    relaxed = soft_top_k(torch.full((2, 6), 3.0), kept, 0.05)
    torch.testing.assert_close(relaxed, torch.full((2, 6), kept / 6))


def test_a_low_temperature_gives_the_hard_mask():
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    relaxed = soft_top_k(scores, 2, 1e-3)
    torch.testing.assert_close(relaxed, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))


@pytest.mark.parametrize(("kept", "value"), [(0, 0.0), (4, 1.0)])
def test_keeping_nothing_or_everything_leaves_no_choice(kept, value):
    relaxed = soft_top_k(torch.randn(3, 4), kept, 0.1)
    assert torch.equal(relaxed, torch.full((3, 4), value))


def test_gradient_equals_finite_differences(monkeypatch):
    monkeypatch.setattr("llmc_attnmask.solvers.relaxation._TOLERANCE", 1e-13)
    torch.manual_seed(0)
    scores = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, 3, 0.7), scores)
