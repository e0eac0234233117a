import pytest
import torch

from integration.benchmarks import allocations
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.checkpoint.source import read_tokenizer
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.plan import entries_of, split
from llmc_attnmask.oneshot.planned_recipe import PlannedRecipe
from llmc_attnmask.oneshot.recipe import find_recipe
from llmc_attnmask.oneshot.sensitivity import Sensitivity
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.text.dataset import BUILTIN, load_texts
from llmc_attnmask.text.windows import calibration_windows

RECIPE = PlannedRecipe(find_recipe("block_unstructured_60"))


@pytest.fixture
def model():
    return load(MODEL_DIR)


@pytest.fixture
def windows():
    tokenizer = read_tokenizer(MODEL_DIR)
    return calibration_windows(load_texts(BUILTIN), tokenizer, 12, 64)


def average(model, groups, sparsities) -> float:
    sizes = entries_of(model, groups)
    total = sum(sizes[group] * sparsity for group, sparsity in sparsities.items())
    return total / sum(sizes.values())


@torch.no_grad()
def test_owl_prunes_the_layer_with_most_outliers_least(model, windows):
    model.model.layers[2].mlp.down_proj.weight[:, :50] *= 100
    groups = RECIPE.groups(model)
    found = allocations.owl(model, groups, 0.6, windows)
    lowest = {group for group in found if found[group] == min(found.values())}
    assert lowest == {group for group in groups if "layers.2." in group}
    assert max(found.values()) - min(found.values()) == pytest.approx(0.16)
    assert average(model, groups, found) == pytest.approx(0.6)


def test_evopress_lowers_the_loss_of_all_groups_together(model, windows, monkeypatch):
    monkeypatch.setattr(allocations, "_GENERATIONS", 2)
    groups = RECIPE.groups(model)
    found = allocations.evopress(model, groups, 0.6, windows)
    assert average(model, groups, found) == pytest.approx(0.6)
    structure, device = MaskStructure.parse("0:0"), torch.device("cpu")
    sensitivity = Sensitivity(model, *split(windows), groups, structure, device)
    uniform = allocations.uniform(model, groups, 0.6, windows)
    before, after = sensitivity.together([uniform, found])
    assert after.kl < before.kl


def test_evopress_stays_within_what_a_plan_chooses_from(model, windows, monkeypatch):
    monkeypatch.setattr(allocations, "_GENERATIONS", 1)
    found = allocations.evopress(model, RECIPE.groups(model), 0.8, windows)
    assert set(found.values()) == {0.8}
