"""The baselines that a run is compared with are the methods they are named after."""

import pytest
import torch

from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.upstream.baselines import baselines
from tests.support.sparsegpt import sparsegpt_weight


@pytest.fixture
def problem():
    torch.manual_seed(0)
    weight, x = torch.randn(16, 32), torch.randn(400, 32) @ torch.randn(32, 32)
    return weight, x.T @ x


@pytest.mark.parametrize("structure", ["2:4", "1:4", "0:0"])
def test_each_baseline_prunes_as_requested_and_leaves_its_arguments_alone(
    problem, structure
):
    parsed = MaskStructure.parse(structure)
    sparsity = 0.5 if parsed.unstructured else parsed.pruned / parsed.group
    weight, hessian = problem
    before = weight.clone(), hessian.clone()
    for baseline in baselines(parsed, sparsity).values():
        pruned = baseline(weight, hessian)
        assert (pruned == 0).float().mean() == pytest.approx(sparsity, abs=0.01)
        if not parsed.unstructured:
            zeros = (pruned == 0).view(-1, parsed.group).sum(-1)
            assert (zeros == parsed.pruned).all()
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_wanda_and_magnitude_follow_their_formulas(problem):
    weight, hessian = problem
    found = baselines(MaskStructure.parse("2:4"), 0.5)
    for name, scores in {
        "magnitude": weight.abs(),
        "Wanda": weight.abs() * hessian.diagonal().sqrt(),
    }.items():
        kept = scores.view(-1, 4).topk(2).indices
        mask = torch.zeros(len(weight) * 8, 4, dtype=torch.bool).scatter(1, kept, True)
        expected = weight.masked_fill(~mask.view_as(weight), 0.0)
        assert torch.equal(found[name](weight, hessian), expected)


def test_sparsegpt_equals_llm_compressors_own(problem):
    structure = MaskStructure.parse("2:4")
    pruned = baselines(structure, 0.5)["SparseGPT"](*problem)
    assert torch.equal(pruned, sparsegpt_weight(*problem, structure, 0.5))
