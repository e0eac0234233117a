import pytest
import torch
from torch import nn

from llmc_attnmask import ALPSPruningModifier
from llmc_attnmask.evaluation.perplexity import load_model
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.runlog.journal import entries
from llmc_attnmask.solvers.alps import LinearProblem, prune_linears

TWO_OF_FOUR = MaskStructure.parse("2:4")


def problem(inputs: torch.Tensor) -> LinearProblem:
    torch.manual_seed(0)
    found = LinearProblem("up_proj", nn.Linear(8, 12, bias=False))
    for sample in inputs:
        found.add(sample)
    return found


def test_the_reported_error_is_that_of_the_output():
    inputs = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))
    given = problem(inputs)
    (found,) = prune_linears([given], TWO_OF_FOUR, [0.5])
    assert ((~found.kept).view(-1, 4).sum(-1) == 2).all() and not found.fallback
    dense = given.weight(torch.device("cpu"))
    lost = (inputs @ (found.weight - dense).T).square().sum()
    relative = lost / (inputs @ dense.T).square().sum()
    assert found.error == pytest.approx(relative.item(), rel=1e-3)


def test_inputs_that_overflow_are_refused_with_the_name_of_the_linear():
    with pytest.raises(ValueError, match="the inputs of up_proj overflow"):
        prune_linears([problem(torch.full((1, 2, 8), 1e30))], TWO_OF_FOUR, [0.5])


@pytest.mark.usefixtures("failing_solver")
def test_solvers_that_fail_leave_finite_weights_and_a_note_in_the_journal(
    tokenizer, calibration, warnings
):
    model = load_model(MODEL_DIR)
    fields = {"sparsity": 0.5, "mask_structure": "2:4", "targets": "re:.*up_proj$"}
    compress(model, tokenizer, [ALPSPruningModifier(**fields)], calibration[:8, :64])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for layer in model.model.layers:
        assert ((layer.mlp.up_proj.weight == 0).view(-1, 4).sum(-1) >= 2).all()
    fallbacks = [e.measurements.get("fallback") for e in entries(model)]
    assert len(fallbacks) == 4 and all(fallbacks)
