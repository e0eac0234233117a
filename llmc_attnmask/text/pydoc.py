"""Text that every Python installation has: the standard library's own documentation.

A document is one module's docstrings, outer ones first. Entire top-level modules are
held out for evaluation, so no document of the ``evaluation`` split shares a package
with the ``calibration`` split. The help topics of ``pydoc`` belong to ``calibration``.
"""

import ast
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Literal

Split = Literal["calibration", "evaluation"]

# Missing from some installations (Linux distributions package them separately, or newer
# versions dropped them), or tests rather than documentation.
_EXCLUDED = {
    "__pycache__",
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}
_HELD_OUT_ONE_IN = 8


@cache
def documents(split: Split) -> tuple[str, ...]:
    """Return the documents of one split, in a fixed order for each Python version.

    :param split: ``"calibration"`` (about seven eighths) or ``"evaluation"``
    :return: one string per module with at least one docstring
    """
    texts = [
        text
        for path in _sources()
        if _split_of(path.parts[0].removesuffix(".py")) == split
        and (text := _docstrings(_stdlib() / path))
    ]
    if split == "calibration":
        texts.extend(_help_topics())
    return tuple(texts)


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _sources() -> Iterator[Path]:
    root = _stdlib()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _EXCLUDED.isdisjoint(relative.parts):
            yield relative


def _split_of(top_level_module: str) -> Split:
    # crc32 rather than hash(): the split must not differ between processes
    held_out = zlib.crc32(top_level_module.encode()) % _HELD_OUT_ONE_IN == 0
    return "evaluation" if held_out else "calibration"


def _docstrings(source: Path) -> str:
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError):  # templates, and files for other interpreters
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        docstring
        for node in ast.walk(tree)
        if isinstance(node, documented) and (docstring := ast.get_docstring(node))
    ]
    return "\n\n".join(found)


def _help_topics() -> list[str]:
    try:
        topics = import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:  # some minimal installations leave it out
        return []
    return [topics[name] for name in sorted(topics)]
