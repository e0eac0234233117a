import json

import pytest
import torch
import yaml

from llmc_attnmask.checkpoint.inspect import inspect
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot import plan as planning
from llmc_attnmask.oneshot.depth import weighed_by_depth
from llmc_attnmask.oneshot.plan import plan, plan_on
from llmc_attnmask.oneshot.planned_recipe import PlannedRecipe
from llmc_attnmask.oneshot.prune import prune
from llmc_attnmask.oneshot.recipe import RecipeError, find_recipe, load_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.oneshot.trade_off import Budget, TradeOff
from llmc_attnmask.runlog.progress import Progress
from tests.support.architectures import FAMILIES, small_model

QUICK = {"dataset": "builtin:pydoc", "num_samples": 8, "max_length": 64}
ALPS = """
prune_stage:
  pruning_modifiers:
    ALPSPruningModifier:
      sparsity: 0.5
      targets: ["re:.*(q|k|v|o|gate|up|down)_proj$"]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    output = tmp_path_factory.mktemp("plan") / "plan.yaml"
    return plan(MODEL_DIR, "block_2of4_quick", output, **QUICK, dense_share=0.25)


def test_every_group_has_a_cost_and_the_budget_is_kept(made):
    assert len(made.costs) == len(made.entries) == 16  # four of each of four layers
    assert all(set(of) == {0.5} and of[0.5] > 0 for of in made.costs.values())
    assert made.chosen.dense_share == pytest.approx(0.25, abs=0.02)
    assert made.chosen.dense_share <= 0.25
    # a share of the curve is not measured twice
    assert len(made.curve) == 6 and made.chosen in made.curve
    sizes = [point.size for point in made.curve]
    assert sizes == sorted(sizes)


def test_the_sum_of_costs_predicts_the_loss_of_all_groups_together(made):
    for point in made.curve:
        assert point.measured == pytest.approx(point.predicted, rel=0.25)


def test_the_chosen_groups_lose_less_than_the_first_and_last_layers(made):
    dense = {group for group, s in made.chosen.sparsities.items() if not s}
    naive = {g for g in made.costs if ".0." in g}  # a quarter of the weights
    saved = sum(made.costs[group][0.5] for group in dense)
    assert saved > sum(made.costs[group][0.5] for group in naive)


def test_late_groups_count_for_more_in_the_choice_if_the_recipe_recovers(made):
    names = [f"model.layers.{n}." for n in range(4)]
    blocks = {name: [g for g in made.entries if g.startswith(name)] for name in names}
    trade_off = TradeOff(made.entries, MaskStructure.parse("2:4"))
    weighed = weighed_by_depth(made.costs, blocks)
    assert made.chosen.sparsities == trade_off.choose(made.budget, weighed)
    assert made.chosen.weighed == trade_off.total(weighed, made.chosen.sparsities)
    assert made.chosen.weighed != made.chosen.predicted


def test_costs_that_another_version_has_kept_are_measured_again(
    made, tmp_path, tokenizer, calibration
):
    planned = PlannedRecipe(find_recipe("block_2of4_quick"))
    progress = Progress(tmp_path / "progress", {}, [])
    other = {"model.layers.0.self_attn.q_proj": {0.4: 0.1, 0.7: 0.2}}
    progress.save_data("costs model.layers.0", other)
    found = plan_on(
        load(MODEL_DIR),
        planned,
        tmp_path / "plan.yaml",
        calibration[:16, :64],
        made.budget,
        progress=progress,
    )
    assert found.costs.keys() == made.costs.keys()
    kept = progress.read_data("costs model.layers.0")
    assert kept.keys() == {g for g in made.costs if ".0." in g}
    progress.close()


def test_the_recipe_is_complete_and_says_what_was_planned(made):
    assert load_recipe(made.recipe).modifiers
    content = yaml.safe_load(made.recipe.read_text(encoding="utf-8"))
    summary = content["args"]["llmc_attnmask_plan"]
    assert summary["budget"] == "dense_share 0.25"
    assert summary["model"].startswith("LlamaForCausalLM, ")
    assert len(summary["curve"]) == 6
    assert not list(made.recipe.parent.glob(".*"))  # no progress is left


def test_a_plan_that_was_interrupted_continues_and_gives_the_same_recipe(
    made, tmp_path, monkeypatch
):
    output = tmp_path / "plan.yaml"
    measured = []
    original = planning.Progress.save_data

    def save(self, name, data):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(name)
        original(self, name, data)

    monkeypatch.setattr(planning.Progress, "save_data", save)
    with pytest.raises(KeyboardInterrupt) as stopped:
        plan(MODEL_DIR, "block_2of4_quick", output, **QUICK, dense_share=0.5)
    assert "--resume continues from there" in stopped.value.__notes__[0]
    with pytest.raises(FileExistsError, match="interrupted plan; run the same command"):
        plan(MODEL_DIR, "block_2of4_quick", output, **QUICK, dense_share=0.25)
    monkeypatch.setattr(planning.Progress, "save_data", original)
    # with any budget: neither costs nor the pilot at 2:4 depend on it
    monkeypatch.setattr(planning, "run_pilot", None)
    again = plan(
        MODEL_DIR, "block_2of4_quick", output, **QUICK, dense_share=0.25, resume=True
    )
    assert again.costs == made.costs
    assert output.read_bytes() == made.recipe.read_bytes()


def test_a_loss_is_kept_to_with_few_bytes(made, tmp_path):
    budget = made.chosen.expected
    found = plan(
        MODEL_DIR, "block_2of4_quick", tmp_path / "plan.yaml", **QUICK, loss=budget
    )
    assert found.chosen.expected <= budget * 1.0001
    group = max(made.entries.values()) / sum(made.entries.values())
    assert found.chosen.size <= made.chosen.size + 0.4375 * group  # one group's bytes


def test_unstructured_sparsity_is_planned_linear_by_linear(tmp_path):
    template = tmp_path / "template.yaml"
    template.write_text(ALPS, encoding="utf-8")
    found = plan(MODEL_DIR, template, tmp_path / "plan.yaml", **QUICK, sparsity=0.6)
    assert 0.6 <= found.chosen.sparsity <= 0.62
    assert len(found.costs) == 28  # seven Linears of each of four layers
    assert len(set(found.chosen.sparsities.values())) > 3
    trade_off = TradeOff(found.entries, MaskStructure.parse("0:0"))
    uniform = trade_off.total(found.costs, dict.fromkeys(found.entries, 0.6))
    assert found.chosen.predicted < uniform
    assert found.chosen.weighed == found.chosen.predicted  # nothing is recovered


def test_prune_with_a_budget_plans_and_prunes(made, tmp_path):
    output = prune(
        MODEL_DIR, "block_2of4_quick", tmp_path / "out", **QUICK, dense_share=0.25
    )
    dense = {g for g, s in made.chosen.sparsities.items() if not s}
    for layer in inspect(output):
        if layer.name.endswith("down_proj"):
            assert layer.two_of_four == (layer.name not in dense)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report["plan"]["budget"] == "dense_share 0.25"
    assert not list(tmp_path.glob(".*"))


CAUSAL = [n for n, f in FAMILIES.items() if f.head == "AutoModelForCausalLM"]


@pytest.mark.parametrize("family", CAUSAL)
def test_every_architecture_is_planned_or_refused(family, tmp_path):
    template = tmp_path / "template.yaml"
    template.write_text(ALPS.replace("(q|k|v|o|gate|up|down)_proj$", r"\\.\\d+\\..*"))
    model = small_model(family)
    arguments = (tmp_path / "plan.yaml", torch.randint(5, 2000, (12, 16)))
    planned = PlannedRecipe(template)
    if family == "gpt2":  # its layers are Conv1D
        with pytest.raises(RecipeError, match="prunes no Linear of GPT"):
            plan_on(model, planned, *arguments, Budget("sparsity", 0.6))
        return
    made = plan_on(model, planned, *arguments, Budget("sparsity", 0.6))
    assert made.chosen.sparsity >= 0.6
    assert all(cost >= 0 for of in made.costs.values() for cost in of.values())
    assert load_recipe(made.recipe).modifiers


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"num_samples": 9}, {"size": 0.7}, {"dense_share": None}]
)
def test_a_plan_is_resumed_only_by_the_same_command(other, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    output = tmp_path / "a" / "out"
    command = {**QUICK, "dense_share": 0.25}
    monkeypatch.setattr("llmc_attnmask.oneshot.prune.compress", stopped)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        prune(MODEL_DIR, "block_2of4_quick", output, **command)
    assert "the plan are kept in" in interrupt.value.__notes__[0]
    if "size" in other:
        command.pop("dense_share")
    with pytest.raises(
        ValueError, match="holds a plan of another run, for dense_share"
    ):
        prune(MODEL_DIR, "block_2of4_quick", output, **command | other, resume=True)
    assert list(output.glob(".progress/plan-*.yaml"))


def test_a_run_without_a_plan_is_not_resumed_with_one(tmp_path, monkeypatch):
    save = Progress.save

    def saved_and_stopped(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "save", saved_and_stopped)
        with pytest.raises(KeyboardInterrupt):
            prune(MODEL_DIR, "block_2of4_quick", output, **QUICK)
    kept = sorted(path.name for path in output.glob(".progress/*"))
    assert any(name.endswith(".safetensors") for name in kept)
    with pytest.raises(ValueError, match=r"which has no plan for dense_share 0\.25"):
        prune(
            MODEL_DIR,
            "block_2of4_quick",
            output,
            **QUICK,
            dense_share=0.25,
            resume=True,
        )
    assert sorted(path.name for path in output.glob(".progress/*")) == kept


def test_bad_input_leaves_nothing_behind(tmp_path):
    output = tmp_path / "a" / "out"
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    for bad in ({"dataset": str(text)}, {"dense_share": 1.5}):
        with pytest.raises(ValueError):
            prune(
                MODEL_DIR,
                "block_2of4_quick",
                output,
                **QUICK | {"dense_share": 0.5} | bad,
            )
        assert not output.exists()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"dense_share": 1.0}, "dense_share 1 leaves nothing to prune"),
        ({}, "needs a budget: one of"),
        ({"size": 0.7, "loss": 0.1}, "size and loss are given; a plan has one budget"),
        ({"size": 0.3}, r"cannot be met.*between 0\.5625 and 1"),
        ({"loss": 1e-9}, "leaves nothing to prune"),
    ],
)
def test_budgets_that_make_no_plan_are_refused(budget, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan(MODEL_DIR, "block_2of4_quick", tmp_path / "plan.yaml", **QUICK, **budget)
    assert not (tmp_path / "plan.yaml").exists()


def test_an_output_that_exists_is_refused(made):
    with pytest.raises(FileExistsError, match="name a new file or remove it"):
        plan(MODEL_DIR, "block_2of4_quick", made.recipe, **QUICK, dense_share=0.5)


def test_prune_refuses_a_plan_for_another_model(made, tmp_path):
    text = made.recipe.read_text(encoding="utf-8")
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("LlamaForCausalLM", "Qwen3ForCausalLM"))
    with pytest.raises(RecipeError, match="is a plan for another model"):
        prune(MODEL_DIR, other, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
