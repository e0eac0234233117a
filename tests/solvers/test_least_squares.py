import pytest
import torch
from torch import Tensor

from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.solvers.least_squares import choose_mask, solve
from tests.support.sparsegpt import sparsegpt_weight

ROWS, COLUMNS, HEADS = 24, 64, 3
TWO_OF_FOUR = MaskStructure.parse("2:4")


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """H and W of correlated inputs, and G of correlated heads."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator)
    mix *= torch.logspace(0, -2, COLUMNS)
    x = torch.randn(512, COLUMNS, generator=generator) @ mix
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    rows = ROWS // HEADS
    g = torch.randn(HEADS, 4 * rows, rows, generator=generator)
    g = g * torch.logspace(0, -1.5, rows) @ torch.randn(rows, rows, generator=generator)
    return x.T @ x, weight, g.mT @ g


def quadratic(change: Tensor, hessian: Tensor, sensitivity: Tensor | None = None):
    product = change @ hessian
    if sensitivity is not None:
        blocks = product.view(len(sensitivity), -1, product.shape[-1])
        product = (sensitivity @ blocks).view(change.shape)
    return (product * change).sum().item()


@pytest.mark.parametrize("structure, sparsity", [("2:4", 0.5), ("0:0", 0.6)])
def test_mask_and_survivors_beat_those_of_sparsegpt(problem, structure, sparsity):
    hessian, weight, _ = problem
    parsed = MaskStructure.parse(structure)
    target = weight @ hessian
    kept, start = choose_mask(hessian, target, weight, parsed, sparsity)
    found = solve(hessian, target, start, kept)
    theirs = sparsegpt_weight(weight, hessian, parsed, sparsity)
    error, reference = (quadratic(w - weight, hessian) for w in (found, theirs))
    assert error < 0.75 * reference
    assert not found[~kept].any()
    if parsed.unstructured:
        assert int((~kept).sum()) == round(sparsity * weight.numel())
    else:
        assert ((~kept).view(-1, 4).sum(-1) == 2).all()


def test_knowing_what_matters_downstream_improves_the_choice(problem):
    hessian, weight, sensitivity = problem
    target = weight @ hessian
    errors = []
    for known in (None, sensitivity):
        kept, start = choose_mask(hessian, target, weight, TWO_OF_FOUR, 0.5, known)
        found = solve(hessian, target, start, kept, known)
        errors.append(quadratic(found - weight, hessian, sensitivity))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_survivors_solve_the_damped_normal_equations(problem, weighted):
    hessian, weight, sensitivity = problem
    rows = ROWS // HEADS
    generator = torch.Generator().manual_seed(1)
    target = weight @ hessian + torch.randn(weight.shape, generator=generator)
    # few columns and a mild spectrum: conjugate gradients converge fully
    hessian = hessian[:8, :8] + hessian[:8, :8].diagonal().mean() * torch.eye(8)
    weight, target = weight[:, :8], target[:, :8]
    kept = TWO_OF_FOUR.mask(weight.abs(), 0.5)
    blocks = sensitivity + sensitivity.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(
        rows
    )
    found = solve(hessian, target, weight, kept, blocks if weighted else None)
    # one linear system over all entries, in double precision
    pull = 0.01 * hessian.diagonal().mean()
    h = (hessian + pull * torch.eye(8)).double()
    mean = blocks.diagonal(dim1=-2, dim2=-1).mean()
    g = torch.block_diag(*(blocks / mean + 0.01 * torch.eye(rows))).double()
    g = g if weighted else torch.eye(ROWS).double()
    system = torch.kron(g, h)[kept.flatten()][:, kept.flatten()]
    right = (g @ (target + pull * weight).double()).flatten()[kept.flatten()]
    expected = torch.zeros(weight.numel(), dtype=torch.float64)
    expected[kept.flatten()] = torch.linalg.solve(system, right)
    torch.testing.assert_close(
        found.double().flatten(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max()
    )


def test_keeping_everything_gives_the_dense_weight(problem):
    hessian, weight, sensitivity = problem
    kept = torch.ones_like(weight, dtype=torch.bool)
    found = solve(hessian, weight @ hessian, weight, kept, sensitivity)
    torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3)


def test_inputs_that_never_occur_leave_a_finite_weight():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for hessian in (torch.zeros(8, 8), torch.diag(torch.tensor([1.0] * 4 + [0.0] * 4))):
        kept, start = choose_mask(hessian, weight @ hessian, weight, TWO_OF_FOUR, 0.5)
        found = solve(hessian, weight @ hessian, start, kept)
        assert found.isfinite().all() and ((~kept).view(-1, 4).sum(-1) == 2).all()
