import math
from dataclasses import replace

import pytest
import torch

from llmc_attnmask.attention.capture import AttentionReplica
from llmc_attnmask.attention.matrix import attention_error, attention_norms
from llmc_attnmask.attention.projections import find_projections
from llmc_attnmask.evaluation.attention_error import attention_inputs
from llmc_attnmask.evaluation.perplexity import load_model
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.solvers.attention_layer import AttentionLayer
from llmc_attnmask.solvers.matrix_objective import MatrixObjective
from llmc_attnmask.solvers.output_objective import OutputObjective
from llmc_attnmask.solvers.settings import SolverSettings
from llmc_attnmask.solvers.solver import learn_masks
from tests.support.sparsegpt import sparsegpt_weight

TWO_OF_FOUR = MaskStructure.parse("2:4")
SETTINGS = SolverSettings(
    structure=TWO_OF_FOUR,
    sparsity=0.5,
    steps=60,
    learning_rate=0.1,
    batch_size=4,
    l2_penalty=0.0,
    output_weight=0.0,
    update_weights=False,
    seed=0,
)


@pytest.fixture(scope="module")
def layer(calibration):
    model = load_model(MODEL_DIR)
    name, inputs = list(attention_inputs(model, calibration).items())[-1]
    replica = AttentionReplica(model.get_submodule(name))
    return AttentionLayer(replica, inputs, find_projections(replica.module))


def solve(layer, structure=TWO_OF_FOUR, sparsity=0.5, prune=("q", "k"), **changes):
    settings = replace(SETTINGS, structure=structure, sparsity=sparsity, **changes)
    (solution,) = learn_masks(layer, prune, settings)
    return solution


def output_error(layer, masks) -> float:
    """The relative ||(A - A~) V W_o||^2 over all calibration samples."""
    output_projection = layer.replica.module.get_parameter("o_proj.weight")
    samples = range(len(layer.inputs))
    weights = {role: layer.dense(role) * mask for role, mask in masks.items()}
    reference, pruned = layer.call(samples), layer.call(samples, weights)
    error = attention_error(
        reference,
        pruned.query,
        pruned.key,
        matrix_weight=0,
        output_weight=1,
        output_projection=output_projection,
    )
    return error.item() / attention_norms(reference, output_projection).output


@pytest.mark.parametrize("structure", ["2:4", "4:8", "1:3", "0:0"])
def test_learned_masks_have_the_structure_and_a_much_lower_error(layer, structure):
    parsed = MaskStructure.parse(structure)
    sparsity = 0.5 if parsed.unstructured else parsed.pruned / parsed.group
    solution = solve(layer, parsed, sparsity)
    assert solution.error < 0.6 * solution.start_error
    for mask in solution.masks.values():
        if parsed.unstructured:
            assert int((~mask).sum()) == round(sparsity * mask.numel())
        else:
            groups = (~mask).view(-1, parsed.group).sum(-1)
            assert (groups == parsed.pruned).all()


def test_the_comparison_separates_the_errors_that_the_objective_weighs(layer):
    settings = replace(SETTINGS, steps=4, output_weight=0.75)
    baselines = {"dense": lambda weight, _: weight, "broken": lambda w, _: w * math.nan}
    (solution,) = learn_masks(layer, ("q", "k"), settings, baselines)
    ours = solution.compared["ours"]
    weighed = 0.25 * ours.matrix + 0.75 * ours.output
    assert weighed == pytest.approx(solution.error, rel=1e-4)
    assert solution.compared["dense"] == (0.0, 0.0)
    assert "broken" not in solution.compared
    assert not solve(layer, steps=0).compared  # without baselines


def test_the_result_is_never_worse_than_the_start(layer):
    solution = solve(layer, steps=2, learning_rate=1e4)
    assert solution.error <= solution.start_error


def test_a_descent_that_stalls_ends_early(layer, monkeypatch):
    monkeypatch.setattr("llmc_attnmask.solvers.modes._SURVIVOR_STEP", 1e3)
    solution = solve(layer, steps=80, update_weights=True)
    assert solution.error == solution.start_error
    assert len(solution.curve) == 40  # half of its eight checks


def test_zero_steps_give_the_start_which_is_wandas_mask(layer):
    solution = solve(layer, steps=0)
    assert solution.error == solution.start_error
    weight = layer.replica.module.get_parameter("q_proj.weight").detach()
    x = torch.cat(list(layer.inputs.hidden), dim=1)[0]
    expected = TWO_OF_FOUR.mask(weight.abs() * x.norm(dim=0), 0.5)
    # norms are rounded differently, so a few entries may differ
    assert (solution.masks["q"] == expected).float().mean() > 0.999


def test_the_same_seed_gives_the_same_masks_and_another_seed_does_not(layer):
    first, second, other = (solve(layer, steps=10, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(first.masks[r], second.masks[r]) for r in "qk")
    assert first.curve == second.curve != other.curve


def test_output_weight_lowers_the_error_of_the_attention_output(layer):
    by_matrix, by_output = (solve(layer, output_weight=w).masks for w in (0.0, 1.0))
    assert output_error(layer, by_output) < output_error(layer, by_matrix)


@pytest.mark.parametrize("structure", ["2:4", "0:0"])
@pytest.mark.parametrize("prune", [("q", "k"), ("v", "o")])
def test_updated_survivors_beat_those_of_sparsegpt(layer, structure, prune):
    parsed = MaskStructure.parse(structure)
    solution = solve(layer, parsed, prune=prune, update_weights=True, steps=16)
    for role, mask in solution.masks.items():
        weight = solution.weights[role]
        assert not weight[~mask].any() and weight[mask].all()
    objective = (
        MatrixObjective(layer, prune, output_weight=0.0)
        if prune == ("q", "k")
        else OutputObjective(layer, prune, {})
    )
    theirs = {
        role: sparsegpt_weight(objective.layer.dense(role), hessian, parsed, 0.5)
        for role, (hessian, _) in objective.curvature().items()
    }
    assert solution.error <= solution.start_error
    assert solution.error < 0.7 * objective.validation_error(theirs)


def test_v_and_o_follow_the_pruned_attention_matrix(layer):
    by_stage = learn_masks(layer, ("v", "k", "o", "q"), replace(SETTINGS, steps=8))
    assert [sorted(solution.masks) for solution in by_stage] == [["k", "q"], ["o", "v"]]
    objective = OutputObjective(layer, ("v", "o"), by_stage[0].weights)
    weights = by_stage[1].weights
    assert by_stage[1].error == pytest.approx(objective.validation_error(weights))


def test_a_single_projection_can_be_pruned(layer):
    solution = solve(layer, prune=("k",), steps=10)
    assert list(solution.masks) == ["k"]


def test_a_single_sample_is_used_for_training_and_validation(layer):
    alone = attention_inputs(load_model(MODEL_DIR), torch.randint(0, 2048, (1, 32)))
    single = list(alone.values())[-1]
    solution = solve(replace(layer, inputs=single), steps=20)
    assert solution.error < solution.start_error


@pytest.mark.parametrize("sparsity", [1e-6, 0.999999])
def test_a_share_below_one_entry_is_rounded(layer, sparsity):
    solution = solve(layer, MaskStructure.parse("0:0"), sparsity, steps=2)
    assert all(mask.all() == (sparsity < 0.5) for mask in solution.masks.values())


def test_a_loss_that_is_not_finite_ends_the_search_with_the_best_mask(layer):
    solution = solve(layer, steps=3, learning_rate=float("inf"))
    assert solution.error == solution.start_error
    assert all(
        ((~mask).view(-1, 4).sum(-1) == 2).all() for mask in solution.masks.values()
    )


def test_zero_sparsity_prunes_nothing(layer):
    solution = solve(layer, MaskStructure.parse("0:0"), 0.0)
    assert solution.error == 0 and all(m.all() for m in solution.masks.values())


def test_the_l2_penalty_is_part_of_the_loss(layer):
    plain, penalized = (solve(layer, steps=1, l2_penalty=p) for p in (0.0, 2.0))
    # at the start the relaxed masks are even, near 1/2: lambda/2 * (1/4 + 1/4)
    assert penalized.curve[0] - plain.curve[0] == pytest.approx(0.5, rel=0.4)


def test_accuracy_mode_has_no_relaxed_mask_to_penalize(layer):
    plain, penalized = (
        solve(layer, steps=2, l2_penalty=p, update_weights=True) for p in (0.0, 2.0)
    )
    assert penalized.curve == plain.curve


@pytest.mark.parametrize("update", [False, True])
def test_a_gradient_that_is_not_finite_keeps_the_best_mask(layer, update, warnings):
    calls = 0

    def overflow(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> None:
        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return gradient * math.inf if calls > 20 else gradient

        if output.requires_grad:
            output.register_hook(spoil)

    handle = layer.replica.module.q_proj.register_forward_hook(overflow)
    try:
        solution = solve(layer, steps=40, output_weight=0.9, update_weights=update)
    finally:
        handle.remove()
    assert "gradient" in solution.fallback
    assert any(solution.fallback in warning for warning in warnings)
    assert solution.error <= solution.start_error and math.isfinite(solution.error)
    for role, mask in solution.masks.items():
        assert ((~mask).view(-1, 4).sum(-1) == 2).all()
        assert solution.weights[role].isfinite().all()


@pytest.mark.usefixtures("failing_solver")
def test_a_second_order_solution_that_is_not_finite_falls_back_to_wandas_mask(
    layer, warnings
):
    solution = solve(layer, steps=0, output_weight=0.9, update_weights=True)
    assert "second-order" in solution.fallback and warnings
    dense = layer.replica.module.q_proj.weight
    mask = solution.masks["q"]
    assert torch.equal(solution.weights["q"], dense.masked_fill(~mask, 0.0))
