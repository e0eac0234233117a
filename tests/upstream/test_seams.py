"""The table of seams is complete, and what it names exists."""

import re

import pytest

from llmc_attnmask.upstream import SEAMS, Seam
from tests.support.documents import ROOT

PACKAGE = ROOT / "llmc_attnmask"
PINS = (ROOT / "constraints.txt").read_text() + (
    ROOT / "integration" / "serving" / "requirements.txt"
).read_text()


def test_every_module_of_the_room_is_in_the_table():
    modules = {f"upstream/{p.name}" for p in (PACKAGE / "upstream").glob("*.py")}
    assert modules - {"upstream/__init__.py"} <= {seam.module for seam in SEAMS}


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.what)
def test_a_seam_names_a_module_and_a_canary_that_exist(seam: Seam):
    assert (PACKAGE / seam.module).is_file()
    file, _, function = seam.canary.partition("::")
    assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("version", sorted({seam.version for seam in SEAMS}))
def test_the_version_that_was_read_is_the_one_that_is_pinned(version: str):
    """When a pin changes, read these seams in the new version and update the table."""
    assert re.search(rf"^{re.escape(version)}\b", PINS, re.MULTILINE)
