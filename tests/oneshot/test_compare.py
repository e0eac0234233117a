from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.oneshot import compare
from llmc_attnmask.oneshot.chat import answer
from llmc_attnmask.oneshot.compare import DENSE, Comparison, Row, time_left
from llmc_attnmask.oneshot.methods import BASELINES, Method, methods
from llmc_attnmask.oneshot.planned_recipe import PlannedRecipe, model_identity
from llmc_attnmask.oneshot.recipe import find_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR

RECIPES = Path(__file__).parents[2] / "recipes"
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_the_table_has_every_method_and_ours_win(calibration, evaluation, tmp_path):
    recipes = [
        RECIPES / f"{name}.yaml" for name in ("attention_2of4", "attention_2of4_light")
    ]
    comparison = Comparison(
        MODEL_DIR, calibration, evaluation[:64], keep=tmp_path / "kept"
    )
    baselines = list(BASELINES)
    rows = {
        method.name: comparison.measure(method)
        for method in [DENSE, *methods("q and k", recipes, baselines)]
    }
    ours = ["ours, 2of4", "ours, 2of4_light"]
    assert list(rows) == ["dense", *baselines, *ours]
    assert rows["dense"].attention_error == 0 and rows["dense"].zeros < 0.01
    for method in (*baselines, *ours):
        assert rows[method].zeros == pytest.approx(0.5, abs=1e-3)
    # light mode against baselines without updates, accuracy mode against all of them
    for mine, others in ((ours[1], baselines[:2]), (ours[0], baselines)):
        least = min(rows[method].attention_error for method in others)
        assert rows[mine].attention_error < 0.6 * least
        assert rows[mine].perplexity < min(rows[m].perplexity for m in others)
    AutoModelForCausalLM.from_pretrained(tmp_path / "kept" / "attention_2of4")


RECIPE = """
prune_stage:
  pruning_modifiers:
    SparseGPTModifier: {{sparsity: {}, mask_structure: "{}", targets: ["re:.*_proj$"]}}
"""


def test_of_the_whole_block_every_linear_is_pruned_and_the_model_answers(
    calibration, evaluation, tokenizer, tmp_path
):
    """A recipe of stock SparseGPT does, through the disk, what the baseline does."""
    recipe = tmp_path / "stock.yaml"
    recipe.write_text(RECIPE.format(0.5, "2:4"))
    comparison = Comparison(MODEL_DIR, calibration[:4], evaluation[:4])
    rows = {}
    for method in methods("whole block", [recipe], ["magnitude", "SparseGPT"]):
        rows[method.name] = comparison.measure(method, ["Why?"])
        assert rows[method.name].zeros == pytest.approx(0.5, abs=1e-3)
        assert rows[method.name].answers == ()  # the model has no chat template
    stock, ours = rows["SparseGPT"], rows["ours, stock"]
    assert stock.perplexity < rows["magnitude"].perplexity
    assert ours.perplexity == pytest.approx(stock.perplexity)
    assert ours.attention_error == pytest.approx(stock.attention_error)

    comparison.tokenizer.chat_template = CHAT
    (found,) = comparison.measure(DENSE, ["What is a list?"]).answers
    assert found == answer(comparison._dense, comparison.tokenizer, "What is a list?")


def test_beside_a_planned_recipe_sparsegpt_prunes_what_it_prunes(
    calibration, evaluation, tmp_path
):
    template = tmp_path / "stock.yaml"
    template.write_text(RECIPE.format(0.5, "2:4"))
    planned = PlannedRecipe(template)
    model = load(MODEL_DIR)
    groups = planned.groups(model)
    chosen = {g: 0.0 if ".0." in g or "down" in g else 0.5 for g in groups}
    output = tmp_path / "planned.yaml"
    summary = dict.fromkeys(("budget", "size", "sparsity", "expected_rise", "curve"))
    summary |= {"model": model_identity(model), "dense_share": 0.4}
    planned.write(output, model, groups, chosen, summary)
    comparison = Comparison(MODEL_DIR, calibration[:4], evaluation[:4])
    found = methods("whole block", [template, output], ["SparseGPT"])
    assert [(m.pruned, m.name) for m in found] == [
        ("whole block", "SparseGPT"),
        ("whole block", "ours, stock"),
        ("whole block but 40%", "SparseGPT"),
        ("whole block but 40%", "ours, planned"),
    ]
    sparsegpt, ours = (comparison.measure(method) for method in found[2:])
    assert sparsegpt.zeros == ours.zeros < 0.35
    assert sparsegpt.perplexity == pytest.approx(ours.perplexity)


def test_an_answer_is_one_line_that_says_where_it_was_cut(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    tokenizer.chat_template = CHAT
    try:
        short = answer(model, tokenizer, "What is a list?", most=4)
        long = answer(model, tokenizer, "What is a list?", most=12)
    finally:
        tokenizer.chat_template = None
    assert short.endswith(" ...") and "\n" not in short
    assert len(long) > len(short) and "assistant" not in long


@pytest.mark.parametrize("sparsities", [(0.5, 0.6), ()])
def test_baselines_need_one_sparsity(tmp_path, sparsities):
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "prune_stage:\n"
        + "".join(
            f"  n{i}_modifiers:\n    ALPSPruningModifier: {{sparsity: {sparsity}, "
            f'mask_structure: "0:0", targets: ["re:.*layers.{i}.*q_proj$"]}}\n'
            for i, sparsity in enumerate(sparsities)
        )
        + "  recovery_modifiers:\n    MaskedRecoveryModifier: {}\n"
    )
    given = "0:0 at 0.5; 0:0 at 0.6" if sparsities else "nothing"
    with pytest.raises(ValueError, match=f"prunes {given}; expected one sparsity"):
        methods("whole block", [recipe], ["SparseGPT"])


def test_the_time_left_is_known_once_a_method_has_been_calibrated():
    todo = methods("q and k", [find_recipe("attention_2of4")], list(BASELINES))
    dense = Row(DENSE, 0.0, 20.0, 0.0, seconds=0.0)
    assert time_left([dense], 10.0, todo) == ""
    wanda = Row(Method("Wanda", "q and k"), 0.1, 30.0, 0.5, seconds=60.0)
    # rows take 10 s beside pruning; SparseGPT takes 1.2 and ours 7 times as long
    assert time_left([dense, wanda], 80.0, todo[2:]) == "; about 9 min left"
    assert time_left([dense, wanda], 80.0, []) == ""


@pytest.mark.slow
def test_the_command_prints_a_table_and_its_conditions(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    options = ["--calibration", text, "--evaluation", text, "--num-samples", 2]
    options += ["--max-length", 32, "--evaluation-windows", 3]
    options += ["--recipe", "--block-recipe", "block_2of4_quick"]
    compare.main([str(option) for option in options])
    printed = capsys.readouterr().out
    assert "1 of 3" in printed and "3 of 3" in printed
    assert (
        "dense" in printed and "SparseGPT" in printed and "ours, block_2of4" in printed
    )
    assert "2 x 32" in printed and "3 x 32" in printed and "answers" not in printed
