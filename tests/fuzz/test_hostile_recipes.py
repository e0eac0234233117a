"""Recipes that broke the reader, or could: each once."""

import pytest

from llmc_attnmask.oneshot.recipe import RecipeError, load_recipe


def billion_laughs(kind: str) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    for i in range(1, 30):
        copies = ", ".join([f"*a{i - 1}"] * 9)
        value = {"lists": f"[{copies}]", "merges": f"{{<<: [{copies}]}}"}[kind]
        lines.append(f"a{i}: &a{i} {value}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (billion_laughs("lists"), "more than 10000 values, with aliases expanded"),
        (billion_laughs("merges"), "more than 10000 values, with aliases expanded"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 3000, "nested too deep"),
        ("a: !!int ''", "value that does not fit its tag: IndexError"),
        ("a: !!bool maybe", "value that does not fit its tag: KeyError"),
        ("a: !!timestamp x", "value that does not fit its tag: AttributeError"),
        ("a: 9999-99-99", "value that does not fit its tag: ValueError"),
        ("? [a]\n: 1", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("# " + "x" * (1 << 20), "has 1048578 bytes; expected at most"),
    ],
)
def test_recipes_that_expand_or_do_not_parse_are_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_many_keys_are_compared_in_one_pass(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(f"a{i}: 1" for i in range(4000)))
    with pytest.raises(RecipeError, match="silently drop 'a0'"):
        load_recipe(path)


def test_moderate_use_of_anchors_is_allowed(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "a_stage:\n  b_modifiers:\n"
        "    SparseGPTModifier: {sparsity: 0.5, targets: &t ['re:.*q_proj$']}\n"
        "    WandaPruningModifier: {sparsity: 0.5, targets: *t}\n"
    )
    first, second = load_recipe(path).modifiers
    assert first.targets == second.targets == ["re:.*q_proj$"]
