from pathlib import Path

import pytest

from tests.support.architectures import FAMILIES, measure, row

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_is_pruned_saved_and_reloaded(family):
    found = measure(family)
    assert found.deviation <= 1e-6
    assert found.misplaced == 0
    assert found.error < found.magnitude_error
    assert found.reloaded_deviation <= 1e-5
    described = row(family, found).split("|")[1:4]  # numbers vary between machines
    assert "|".join(described) in DOCUMENT.read_text(encoding="utf-8")
