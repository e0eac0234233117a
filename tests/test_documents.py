import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llmc_attnmask
from llmc_attnmask.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS += sorted(ROOT.glob("integration/**/*.md"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_recipes_lead_to_files(document):
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    local = [link for link in links if "://" not in link]
    missing = [link for link in local if not (document.parent / link).exists()]
    recipes = set(re.findall(r"recipes/\w+\.yaml", text))
    missing += [recipe for recipe in recipes if not (ROOT / recipe).exists()]
    assert not missing


def test_the_readme_names_commands_that_exist_and_every_recipe():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"^llmc-attnmask (\w+)", text, re.MULTILINE))
    assert commands >= {"prune", "eval", "inspect", "pack"}
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
    for recipe in ROOT.glob("recipes/*.yaml"):
        assert f"recipes/{recipe.name}" in text
    for name in llmc_attnmask.__all__:
        assert not name.endswith("Modifier") or name in text
    targets = set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in targets)
