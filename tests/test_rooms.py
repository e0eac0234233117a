"""The map in CONTRIBUTING.md is that of the package, and imports point downwards."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documents import ROOT

PACKAGE = ROOT / "llmc_attnmask"
MAP = re.findall(
    r"^\| `([\w.]+)/?` \|",
    (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
ROOMS = [name for name in MAP if (PACKAGE / name).exists()]  # from top to bottom
LONGEST = 350  # lines


def imported_rooms(file: Path) -> Iterator[str]:
    """Yield the room of every module of the package that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            package, _, rest = module.partition(".")
            name = rest.partition(".")[0]
            if package == PACKAGE.name and name:
                yield name if (PACKAGE / name).is_dir() else f"{name}.py"


def test_the_map_has_every_room():
    found = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    found |= {p.name for p in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(ROOMS) == found and len(ROOMS) == len(found)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_below_it(room):
    place = PACKAGE / room
    files = place.rglob("*.py") if place.is_dir() else [place]
    below = ROOMS[ROOMS.index(room) :]
    upwards = {
        f"{file.relative_to(PACKAGE)} imports {found}"
        for file in files
        for found in imported_rooms(file)
        if found not in below
    }
    assert not upwards


@pytest.mark.parametrize("folder", ["llmc_attnmask", "tests", "integration", "scripts"])
def test_files_are_short(folder):
    long = {
        str(file.relative_to(ROOT)): lines
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {".py", ".c", ".cc", ".cu", ".cuh", ".h", ".js", ".sh"}
        if (lines := file.read_text(encoding="utf-8").count("\n")) > LONGEST
    }
    assert not long
