"""Add to the site what is not a page in docs/; mkdocs.yml uses this.

README.md becomes the first page. Files outside docs/ that pages link to become part of
the site. Formulas become MathML, which browsers draw without scripts or fonts.
"""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

import typer
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.core import TyperGroup, TyperOption

from llmc_attnmask.cli import app

ROOT = Path(__file__).parents[1]
_PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add files from outside docs/, at their paths in the repository."""
    pages = [ROOT / name for name in _PAGES]
    for page in pages + sorted(ROOT.glob("integration/gpu/*.md")):
        files.append(_file(page, config))
    files.append(File.generated(config, "commands.md", content=commands()))
    for page in [*pages, *sorted(ROOT.glob("docs/*.md"))]:
        for link in _LINK.finditer(page.read_text(encoding="utf-8")):
            target = (page.parent / link[2]).resolve()
            if target.is_file() and files.get_file_from_path(_uri(target)) is None:
                files.append(_file(target, config))
    return files


def _file(path: Path, config: MkDocsConfig) -> File:
    return File.generated(config, _uri(path), abs_src_path=str(path))


def _uri(path: Path) -> str:
    """Return the path of a repository file in the site's sources."""
    relative = path.relative_to(ROOT).as_posix()
    if relative == "README.md":
        return "index.md"
    return relative.removeprefix("docs/")


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn links between repository files into links between files of the site."""
    uri = page.file.src_uri
    if uri == "index.md":
        folder = ROOT
    else:
        source = page.file.abs_src_path
        if source is None:  # generated
            return markdown
        folder = Path(source).parent

    def moved(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if "://" in link[2] or not target.is_file():
            return link[0]
        path = posixpath.relpath(_uri(target), posixpath.dirname(uri) or ".")
        return f"{link[1]}{path}{link[3] or ''}{link[4]}"

    return _LINK.sub(moved, markdown)


def on_page_content(html_text: str, **_: object) -> str:
    """Turn LaTeX into MathML."""
    text = re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>',
        lambda found: _mathml(found[1], "inline"),
        html_text,
        flags=re.DOTALL,
    )
    return re.sub(
        r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>',
        lambda found: f'<div class="formula">{_mathml(found[1], "block")}</div>',
        text,
        flags=re.DOTALL,
    )


def _mathml(escaped: str, display: str) -> str:
    mathml = convert(html.unescape(escaped), display=display)
    # unless told not to, bars grow with their neighbors
    mathml = re.sub(
        "<mo>(&#x02016;|&#x0007C;)</mo>", r'<mo stretchy="false">\1</mo>', mathml
    )
    # browsers know bold letters and digits only by their code points
    return mathml.replace('<mn mathvariant="bold">1</mn>', "<mn>\U0001d7cf</mn>")


def commands() -> str:
    """Make the page of commands from the sources of ``--help``."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    parts = ["# Commands\n\nWhat `llmc-attnmask COMMAND --help` says."]
    for name, command in group.commands.items():
        parts += [f"## {name}", command.help or ""]
        rows = ["| argument | meaning |", "|---|---|"]
        rows += [_row(parameter) for parameter in command.params]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _row(parameter: Any) -> str:
    text = getattr(parameter, "help", None) or ""
    if isinstance(parameter, TyperOption):
        name = ", ".join(parameter.opts)
        shown = parameter.default not in (None, False)
        text += f" [default: {parameter.default}]" if shown else ""
    else:
        name = str(parameter.name).upper()
    text += " [required]" if parameter.required else ""
    return f"| `{name}` | {html.escape(text)} |"
