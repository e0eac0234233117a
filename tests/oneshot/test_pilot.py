import pytest
import torch

from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.pilot import pilot_key, pilot_sparsity, run_pilot
from llmc_attnmask.oneshot.planned_recipe import PlannedRecipe
from llmc_attnmask.oneshot.recipe import find_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.oneshot.trade_off import Budget


@pytest.fixture
def planned() -> PlannedRecipe:
    return PlannedRecipe(find_recipe("block_2of4_w8a8_int8"))


def test_half_of_a_small_model_is_pruned_and_nothing_is_quantized(
    planned, tokenizer, calibration
):
    model = load(MODEL_DIR, dtype="auto")
    dense = load(MODEL_DIR, dtype="auto")
    found = run_pilot(model, tokenizer, planned, calibration[:4, :64], 0.5)
    middle = ("model.layers.1.", "model.layers.2.")
    pruned = {group for group, sparsity in found.sparsities.items() if sparsity}
    assert pruned == {g for g in found.sparsities if g.startswith(middle)}
    assert len(found.weights) == 14
    for name, weight in found.weights.items():
        assert ((weight == 0).view(-1, 4).sum(-1) >= 2).all()
        assert len(weight.unique()) > 256  # not INT8
        assert not torch.equal(weight, dense.get_parameter(f"{name}.weight"))


@pytest.mark.parametrize(
    ("structure", "budget", "expected"),
    [
        ("2:4", Budget("dense_share", 0.25), 0.5),
        ("2:4", Budget("size", 0.9), 0.5),
        ("0:0", Budget("sparsity", 0.6), 0.6),
        ("0:0", Budget("sparsity", 0.1), 0.3),
        ("0:0", Budget("size", 0.4625), 0.6),
        ("0:0", Budget("loss", 0.05), 0.5),
    ],
)
def test_the_sparsity_is_like_that_of_the_budget(structure, budget, expected):
    found = pilot_sparsity(MaskStructure.parse(structure), budget)
    assert found == pytest.approx(expected)


def test_a_pilot_is_known_by_what_prunes(planned):
    key = pilot_key(planned, 0.5)
    assert key == pilot_key(PlannedRecipe(find_recipe("block_2of4_fp8")), 0.5)
    assert key != pilot_key(planned, 0.6)
    assert key != pilot_key(PlannedRecipe(find_recipe("block_2of4_quick")), 0.5)
