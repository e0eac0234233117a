"""The documentation builds as a site, without a warning and without a network."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import llmc_attnmask
from llmc_attnmask.cli import app
from tests.support.documents import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    built = subprocess.run(
        [*command, "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert not built.stderr.strip(), built.stderr
    return folder


class _Loaded(HTMLParser):
    """Collects what a browser fetches for a page on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("stylesheet", "icon"):
            return
        address = given.get("href" if tag == "link" else "src")
        if tag in ("link", "script", "img", "iframe") and address:
            self.addresses.append(address)


def test_pages_load_only_local_files(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        parser = _Loaded()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.addresses
        for address in parser.addresses:
            assert "://" not in address, page
            target = page.parent / re.sub(r"[?#].*", "", address)
            assert target.is_file() or page.name == "404.html", (page, address)


def test_formulas_are_rendered_without_a_script(site):
    page = (site / "how-it-works.html").read_text(encoding="utf-8")
    source = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    assert page.count('display="block"') == source.count("```math") > 10
    assert "arithmatex" not in page and "\\(" not in page


def test_the_api_page_has_every_name_with_its_parameters(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in llmc_attnmask.__all__:
        assert f'id="llmc_attnmask.{name}"' in page
    fields = llmc_attnmask.AttentionMatrixPruningModifier.__annotations__.keys()
    for name in fields - {"requires_calibration_data"}:
        assert name.startswith("_") or f"<code>{name}</code>" in page, name


def test_every_command_has_its_options_on_the_commands_page(site):
    page = (site / "commands.html").read_text(encoding="utf-8")
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert f'id="{name}"' in page
    assert "--num-samples" in page and "Number of calibration windows." in page


def test_search_needs_no_server(site):
    assert (site / "search" / "search_index.js").is_file()
    start = (site / "index.html").read_text(encoding="utf-8")
    assert "assets/iframe-worker.js" in start
