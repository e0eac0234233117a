import gc
import weakref

import pytest
import torch

from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.pilot import pilot_key, pilot_sparsity, run_pilot
from llmc_attnmask.oneshot.planned_recipe import PlannedRecipe
from llmc_attnmask.oneshot.recipe import find_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.oneshot.trade_off import Budget
from tests.support.architectures import small_model


@pytest.fixture
def planned(tmp_path) -> PlannedRecipe:
    text = find_recipe("block_2of4_w8a8_int8").read_text(encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("steps: 600", "steps: 2"))
    return PlannedRecipe(path)


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


def test_no_weights_of_the_model_stay_in_memory(planned, tokenizer, calibration):
    model = load(MODEL_DIR, dtype="auto")
    kept = weakref.ref(model.get_parameter("model.layers.1.mlp.up_proj.weight"))
    run_pilot(model, tokenizer, planned, calibration[:2, :32], 0.5)
    gc.collect()
    assert kept() is None  # although the tracer keeps the model


RECIPE = """
prune_stage:
  pruning_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      targets: {targets}
  recovery_modifiers:
    MaskedRecoveryModifier: {recovery}
"""
ALL = '["re:.*_proj$"]'


@pytest.mark.parametrize(
    ("targets", "recovery", "expected"),
    [
        ('["re:.*layers.3.*_proj$"]', "{steps: 1}", {"3"}),
        (ALL, '{targets: ["re:.*layers.0$"]}', {"1", "2"}),
        (ALL, '{targets: ["re:.*layers.1$"], steps: 1}', {"1", "2"}),
    ],
)
def test_the_blocks_are_those_where_the_recipe_prunes_most(
    targets, recovery, expected, tokenizer, calibration, tmp_path
):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(targets=targets, recovery=recovery))
    model = load(MODEL_DIR, dtype="auto")
    found = run_pilot(model, tokenizer, PlannedRecipe(path), calibration[:2, :32], 0.5)
    assert {name.split(".")[2] for name in found.weights} == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "phi3", "deepseek_v3"])
def test_experts_and_fused_projections_are_pruned(family, tokenizer, tmp_path):
    small_model(family).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", attn_implementation="eager")
    path = tmp_path / "recipe.yaml"
    text = find_recipe("block_2of4").read_text(encoding="utf-8")
    path.write_text(text.replace("steps: 600", "steps: 1"))
    tokens = torch.randint(5, 2000, (8, 64))
    found = run_pilot(model, tokenizer, PlannedRecipe(path), tokens, 0.5)
    assert any("self_attn" in name for name in found.weights)
    assert any("mlp" in name for name in found.weights)
    for weight in found.weights.values():
        assert ((weight == 0).view(-1, 4).sum(-1) >= 2).all()


def test_what_the_recipe_leaves_open_is_set(planned, tokenizer, monkeypatch):
    def stopped(_, __, modifiers, ___):
        found.extend(modifiers)
        raise KeyboardInterrupt

    found: list = []
    monkeypatch.setattr("llmc_attnmask.oneshot.pilot.compress", stopped)
    model, windows = load(MODEL_DIR), torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(KeyboardInterrupt):
        run_pilot(model, tokenizer, planned, windows, 0.5, 7, "disk")
    assert found[-1].seed == 7 and found[-1].offload_activations == "disk"


@pytest.mark.parametrize(
    ("structure", "budget", "expected"),
    [
        ("2:4", Budget("dense_share", 0.25), 0.5),
        ("2:4", Budget("size", 0.9), 0.5),
        ("0:0", Budget("sparsity", 0.6), 0.6),
        ("0:0", Budget("sparsity", 0.05), 0.1),
        ("0:0", Budget("size", 0.4625), 0.6),
        ("0:0", Budget("loss", 0.05), 0.3),
    ],
)
def test_the_sparsity_is_like_that_of_the_budget(structure, budget, expected):
    found = pilot_sparsity(MaskStructure.parse(structure), budget)
    assert found == pytest.approx(expected)


def test_a_pilot_is_known_by_what_prunes():
    names = ("block_2of4", "block_2of4_fp8", "block_2of4_quick")
    plain, quantized, quick = (PlannedRecipe(find_recipe(name)) for name in names)
    assert pilot_key(plain, 0.5) == pilot_key(quantized, 0.5)
    assert (
        len({pilot_key(plain, 0.5), pilot_key(plain, 0.6), pilot_key(quick, 0.5)}) == 3
    )
