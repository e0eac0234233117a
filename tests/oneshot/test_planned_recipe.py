import pytest
import torch
import yaml
from llmcompressor.modeling.moe.linearize import linearize_moe

from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.planned_recipe import (
    PlannedRecipe,
    check_plan,
    model_identity,
    plan_of,
)
from llmc_attnmask.oneshot.recipe import RecipeError, find_recipe, load_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.architectures import small_model

ALL = '["re:.*(q|k|v|o|gate|up|down)_proj$"]'
ALPS = f"""
prune_stage:
  pruning_modifiers:
    ALPSPruningModifier: {{sparsity: 0.6, targets: {ALL}}}
"""
MIXED = """
prune_stage:
  attention_modifiers:
    AttentionMatrixPruningModifier:
      sparsity: 0.5
      mask_structure: "{attention}"
      update_weights: true
      steps: 0
  rest_modifiers:
    ALPSPruningModifier:
      sparsity: 0.5
      mask_structure: "{structure}"
      targets: ["re:.*(v|o|gate|up|down)_proj$"]
"""


@pytest.fixture
def model():
    return load(MODEL_DIR, dtype="auto")


def written(tmp_path, text: str) -> PlannedRecipe:
    path = tmp_path / "template.yaml"
    path.write_text(text, encoding="utf-8")
    return PlannedRecipe(path)


def zeros(model) -> dict[str, float]:
    """Share of zeros of every Linear, by its name without the model's prefix."""
    return {
        name.removeprefix("model.layers."): float((m.weight == 0).float().mean())
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "lm_head" not in name
    }


def executed(planned, model, sparsities, tmp_path, tokenizer, calibration) -> dict:
    groups = planned.groups(model)
    chosen = {group: sparsities(group) for group in groups}
    planned.write(tmp_path / "plan.yaml", model, groups, chosen, {"budget": "a"})
    modifiers = load_recipe(tmp_path / "plan.yaml").modifiers
    compress(model, tokenizer, modifiers, calibration[:8, :64])
    found = zeros(model)
    for group, names in groups.items():
        for name in names:
            share = found[name.removeprefix("model.layers.")]
            assert share == pytest.approx(chosen[group], abs=0.011), name
    return yaml.safe_load((tmp_path / "plan.yaml").read_text(encoding="utf-8"))


def test_groups_that_stay_dense_are_ignored_by_sparsegpt(
    model, tmp_path, tokenizer, calibration
):
    planned = PlannedRecipe(find_recipe("block_2of4_quick"))
    dense = ("layers.0.self_attn.q", "layers.1.mlp.down", "layers.3.mlp.down")
    content = executed(
        planned,
        model,
        lambda group: 0.0 if any(name in group for name in dense) else 0.5,
        tmp_path,
        tokenizer,
        calibration,
    )
    fields = content["prune_stage"]["pruning_modifiers"]["SparseGPTModifier"]
    assert fields["ignore"] == [
        r"re:model\.layers\.0\.self_attn\.(q_proj|k_proj|v_proj)\b",
        r"re:model\.layers\.(1|3)\.mlp\.down_proj\b",
    ]
    assert content["args"]["llmc_attnmask_plan"] == {"budget": "a"}


def test_unstructured_groups_get_their_own_sparsities(
    model, tmp_path, tokenizer, calibration
):
    def sparsity(group: str) -> float:
        if "layers.0.mlp.gate" in group:
            return 0.0
        return 0.35 if "down" in group else 0.7

    content = executed(
        written(tmp_path, ALPS), model, sparsity, tmp_path, tokenizer, calibration
    )
    fields = content["prune_stage"]["pruning_modifiers"]["ALPSPruningModifier"]
    assert set(fields["sparsity"].values()) == {0.35, 0.7}
    first = r"re:model\.layers\.(0|1|2|3)\.mlp\.down_proj\b"
    assert next(iter(fields["sparsity"])) == first


@pytest.mark.parametrize("structure", ["2:4", "0:0"])
def test_q_and_k_get_the_sparsity_of_their_group_from_the_attention_modifier(
    structure, model, tmp_path, tokenizer, calibration
):
    def sparsity(group: str) -> float:
        if "layers.1.self_attn.q" in group:
            return 0.0
        if structure == "2:4":
            return 0.5
        return 0.4 if "layers.2" in group else 0.6

    text = MIXED.format(structure=structure, attention=structure)
    executed(written(tmp_path, text), model, sparsity, tmp_path, tokenizer, calibration)


def test_a_modifier_with_nothing_left_to_prune_is_left_out(
    model, tmp_path, tokenizer, calibration
):
    text = MIXED.format(structure="2:4", attention="2:4")
    content = executed(
        written(tmp_path, text),
        model,
        lambda group: 0.5 if "mlp" in group else 0.0,
        tmp_path,
        tokenizer,
        calibration,
    )
    assert list(content["prune_stage"]) == ["rest_modifiers"]


def test_a_list_of_sparsities_follows_the_layers_that_stay(
    model, tmp_path, tokenizer, calibration
):
    text = """
s_stage:
  a_modifiers:
    AttentionMatrixPruningModifier:
      {sparsity: [0.5, 0.5, 0.5, 0.5], mask_structure: "2:4", steps: 0}
"""
    executed(
        written(tmp_path, text),
        model,
        lambda group: 0.0 if "layers.1" in group else 0.5,
        tmp_path,
        tokenizer,
        calibration,
    )


def test_groups_are_what_the_modifier_prunes_and_nothing_else(model, tmp_path):
    alps = ALPS.replace(ALL, '["re:.*mlp$", "re:.*q_proj$"]')
    groups = written(tmp_path, alps).groups(model)
    assert [*groups] == [f"model.layers.{n}.self_attn.q_proj" for n in range(4)]
    stock = """
s_stage:
  a_modifiers:
    SparseGPTModifier:
      {sparsity: 0.5, mask_structure: "2:4", targets: [LlamaMLP], ignore: ["re:.*down"]}
"""
    groups = written(tmp_path, stock).groups(model)
    assert [*groups] == [f"model.layers.{n}.mlp.gate_proj+up_proj" for n in range(4)]
    # as upstream, which does not ignore the output layer under its own name
    stock = stock.replace("[LlamaMLP]", "[Linear]").replace("re:.*down", "lm_head")
    with pytest.raises(RecipeError, match="prunes lm_head, outside the decoder blocks"):
        written(tmp_path, stock).groups(model)


def test_unstructured_linears_are_groups_unless_a_modifier_prunes_them_alike(
    model, tmp_path
):
    first = [f"self_attn.{x}_proj" for x in "qkvo"]
    first += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = [f"model.layers.0.{name}" for name in first]
    assert [*written(tmp_path, ALPS).groups(model)][:7] == names
    text = MIXED.format(structure="0:0", attention="0:0")
    groups = written(tmp_path, text).groups(model)
    together = "model.layers.0.self_attn.q_proj+k_proj"
    assert groups[together] == names[:2]
    assert names[2] in groups and names[0] not in groups


def test_each_attention_modifier_groups_what_it_prunes(model, tmp_path):
    text = """
s_stage:
  a_modifiers:
    AttentionMatrixPruningModifier:
      {sparsity: 0.5, steps: 0, projections: [q, k], targets: ["re:.*[01].self_attn$"]}
  b_modifiers:
    AttentionMatrixPruningModifier:
      {sparsity: 0.5, projections: [q, k, v, o], targets: ["re:.*2.self_attn$"]}
  c_modifiers:
    ALPSPruningModifier: {sparsity: 0.5, targets: ["re:.*3.self_attn.*_proj$"]}
"""
    groups = [
        g.removeprefix("model.layers.") for g in written(tmp_path, text).groups(model)
    ]
    assert groups == [
        *(f"{layer}.self_attn.q_proj+k_proj" for layer in (0, 1)),
        "2.self_attn.q_proj+k_proj+v_proj+o_proj",
        *(f"3.self_attn.{x}_proj" for x in "qkvo"),
    ]


@pytest.mark.parametrize("structure", ["2:4", "0:0"])
@pytest.mark.parametrize("family", ["phi3", "deepseek_v3", "qwen3_next"])
def test_what_attention_pruning_cannot_do_is_left_to_alps(
    family, structure, tmp_path, tokenizer
):
    """Phi-3 has q, k and v in one Linear, DeepSeek k and v, Qwen3-Next a gate in q."""
    text = MIXED.format(attention=structure, structure=structure)
    if family == "deepseek_v3":  # the names of its q, k and v end otherwise
        text = text.split("  rest_modifiers")[0]
    small_model(family).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", attn_implementation="eager")
    linearize_moe(model)
    planned = written(tmp_path, text)
    groups = planned.groups(model)
    level = dict.fromkeys(groups, 0.5) | {[*groups][-1]: 0.0}
    tokens = torch.randint(5, 2000, (8, 64))
    content = executed(planned, model, level.get, tmp_path, tokenizer, tokens)
    (stage,) = [key for key in content if key.endswith("_stage")]
    assert ("instead_0_modifiers" in content[stage]) == (family != "phi3")
    attention = [n for g in groups for n in groups[g] if "self_attn" in n]
    assert len(attention) >= 4


def test_two_attention_modifiers_leave_their_own_layers_to_alps(tmp_path, tokenizer):
    text = """
s_stage:
  instead_0_modifiers:
    AttentionMatrixPruningModifier:
      {sparsity: 0.5, mask_structure: "2:4", targets: ["re:.*layers.0.self_attn$"]}
  b_modifiers:
    AttentionMatrixPruningModifier:
      {sparsity: 0.5, mask_structure: "2:4", targets: ["re:.*layers.1.self_attn$"]}
"""
    small_model("deepseek_v3").save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", attn_implementation="eager")
    linearize_moe(model)
    tokens = torch.randint(5, 2000, (8, 64))
    executed(written(tmp_path, text), model, lambda _: 0.5, tmp_path, tokenizer, tokens)


def test_a_conv1d_is_refused(tmp_path):
    text = """
s_stage:
  a_modifiers:
    AttentionMatrixPruningModifier: {sparsity: 0.5, mask_structure: "2:4"}
"""
    with pytest.raises(RecipeError, match="c_attn is a Conv1D"):
        written(tmp_path, text).groups(small_model("gpt2"))


def test_experts_of_a_layer_are_one_group():
    model = small_model("qwen3_moe")
    linearize_moe(model)
    planned = PlannedRecipe(find_recipe("block_2of4"))
    groups = planned.groups(model)
    (gate_up,) = [g for g in groups if "layers.0" in g and "gate_proj" in g]
    assert gate_up == "model.layers.0.mlp.experts.*.gate_proj+up_proj"
    assert len(groups[gate_up]) == 4
    unstructured = PlannedRecipe(find_recipe("block_unstructured_60")).groups(model)
    assert len(unstructured["model.layers.0.mlp.experts.*.gate_proj"]) == 2


def test_a_plan_for_another_model_is_refused(model, tmp_path):
    planned = PlannedRecipe(find_recipe("block_2of4"))
    groups = planned.groups(model)
    fields = ("budget", "size", "dense_share", "sparsity", "expected_rise", "curve")
    summary = {"model": model_identity(model), **dict.fromkeys(fields)}
    path = tmp_path / "plan.yaml"
    planned.write(path, model, groups, dict.fromkeys(groups, 0.5), summary)
    check_plan(path, model)
    assert plan_of(path) == summary
    with pytest.raises(RecipeError, match=r"is a plan for another model \(LlamaFor"):
        check_plan(path, small_model("qwen2"))
    del summary["curve"]
    planned.write(path, model, groups, dict.fromkeys(groups, 0.5), summary)
    with pytest.raises(RecipeError, match="has a plan under `args` without curve"):
        check_plan(path, model)


def test_a_recipe_that_was_not_planned_is_for_any_model(model):
    check_plan(find_recipe("block_2of4"), model)
    assert plan_of(find_recipe("block_2of4")) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "s_stage:\n  a_modifiers:\n    MaskedRecoveryModifier: {}",
            "does not prune; expected ALPSPruningModifier",
        ),
        (
            ALPS.replace("ALPSPruningModifier", "SparseGPTModifier"),
            "has one sparsity for all groups.*use ALPSPruningModifier",
        ),
        (
            MIXED.format(structure="2:4", attention="0:0"),
            "mask structures 0:0 and 2:4",
        ),
    ],
)
def test_a_recipe_that_cannot_be_planned_is_refused(text, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        written(tmp_path, text)


def test_projections_of_different_groups_in_one_modifier_are_refused(model, tmp_path):
    text = """
s_stage:
  a_modifiers:
    AttentionMatrixPruningModifier:
      {sparsity: 0.5, mask_structure: "2:4", projections: [q, k, v, o]}
"""
    with pytest.raises(RecipeError, match="let it prune what is in one of them"):
        written(tmp_path, text).groups(model)


def test_a_recipe_that_matches_nothing_of_the_model_is_refused(model, tmp_path):
    text = ALPS.replace("q|k|v|o|gate|up|down", "c")
    with pytest.raises(RecipeError, match="prunes no Linear of LlamaForCausalLM"):
        written(tmp_path, text).groups(model)


def test_inputs_that_the_mask_structure_does_not_divide_are_refused(model, tmp_path):
    text = ALPS.replace("sparsity: 0.6", 'sparsity: 0.2, mask_structure: "1:5"')
    with pytest.raises(ValueError, match=r"q_proj: .* not divisible by 5"):
        written(tmp_path, text).groups(model)
