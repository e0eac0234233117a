"""Run every fuzz target for a moment; ``python -m tests.fuzz.run`` runs longer."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.targets import TARGETS

_EXAMPLES = {"checkpoint": 60, "recipe": 40, "model": 40, "command": 40}


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input_is_read_or_refused_in_one_line(name):
    strategy, target = TARGETS[name]

    @settings(
        max_examples=_EXAMPLES.get(name, 100),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(case):
        target(case)

    run()
