from pathlib import Path

import pytest
import yaml

from llmc_attnmask.oneshot.recipe import RecipeError, load_recipe

GOOD = {
    "prune_stage": {
        "attention_modifiers": {
            "AttentionMatrixPruningModifier": {"sparsity": 0.5, "mask_structure": "2:4"}
        }
    }
}


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_good_recipe_gives_its_modifiers(tmp_path):
    (modifier,) = load_recipe(write(tmp_path, GOOD)).modifiers
    assert type(modifier).__name__ == "AttentionMatrixPruningModifier"
    assert modifier.mask_structure == "2:4"


FIELDS = {"sparsity": 0.5}
DROPPED = {
    "modifiers at the top": {"modifiers": {"AttentionMatrixPruningModifier": FIELDS}},
    "a stage without its suffix": {"prune": GOOD["prune_stage"]},
    "a group without its suffix": {
        "prune_stage": {"group": {"AttentionMatrixPruningModifier": FIELDS}}
    },
    "a list under a group": {
        "prune_stage": {"a_modifiers": [{"AttentionMatrixPruningModifier": FIELDS}]}
    },
    "a modifier without fields": {
        "prune_stage": {"a_modifiers": {"AttentionMatrixPruningModifier": None}}
    },
}


@pytest.mark.parametrize("content", DROPPED.values(), ids=DROPPED.keys())
def test_what_llm_compressor_silently_drops_is_an_error_that_shows_the_right_shape(
    content, tmp_path
):
    with pytest.raises(RecipeError, match=r"silently drop(.|\n)*prune_stage:\n"):
        load_recipe(write(tmp_path, content))


@pytest.mark.parametrize("content", ["", "- a\n- b", "just text", "a: [", "3"])
def test_a_file_that_is_not_a_mapping_is_refused(content, tmp_path):
    with pytest.raises(RecipeError, match=r"is not a mapping: its type is|is not YAML"):
        load_recipe(write(tmp_path, content))


@pytest.mark.parametrize(
    "content", ["a_stage: {}", "a_stage: {b_modifiers: {}}", "args: {}"]
)
def test_a_recipe_without_modifiers_is_refused(content, tmp_path):
    with pytest.raises(RecipeError, match="names no modifier"):
        load_recipe(write(tmp_path, content))


def test_a_key_that_appears_twice_is_refused(tmp_path):
    content = """\
a_stage:
  b_modifiers:
    AttentionMatrixPruningModifier: {sparsity: 0.5, projections: [q]}
    AttentionMatrixPruningModifier: {sparsity: 0.5, projections: [k]}
"""
    with pytest.raises(
        RecipeError, match=r"PruningModifier' appears twice.*\n.*line 3"
    ):
        load_recipe(write(tmp_path, content))


def test_a_structure_without_quotes_is_explained(tmp_path):
    content = """\
a_stage:
  b_modifiers:
    AttentionMatrixPruningModifier: {sparsity: 0.5, mask_structure: 2:4}
"""
    with pytest.raises(RecipeError, match='mask_structure: write it in quotes, "N:M"'):
        load_recipe(write(tmp_path, content))


def test_an_unknown_field_is_named_in_one_line(tmp_path):
    fields = GOOD["prune_stage"]["attention_modifiers"]
    fields = {"AttentionMatrixPruningModifier": {**FIELDS, "sparsty": 1}}
    with pytest.raises(
        RecipeError, match=r"AttentionMatrixPruningModifier\.sparsty: unknown field$"
    ):
        load_recipe(write(tmp_path, {"s_stage": {"g_modifiers": fields}}))


def test_an_unknown_modifier_is_named(tmp_path):
    content = {"s_stage": {"g_modifiers": {"NoSuchModifier": {}}}}
    with pytest.raises(RecipeError, match="NoSuchModifier"):
        load_recipe(write(tmp_path, content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
