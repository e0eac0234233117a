"""The numbers in docs/how-it-works.md are those of the code."""

import re

import pytest

from llmc_attnmask import AttentionMatrixPruningModifier, MaskedRecoveryModifier
from llmc_attnmask.calibration import micro_batches
from llmc_attnmask.modifiers import attention_pruning
from llmc_attnmask.recovery import error
from llmc_attnmask.solvers import gptq, least_squares, modes, solver
from tests.support.documents import ROOT

WORDS = {4: "four", 8: "eight"}
FIELDS = AttentionMatrixPruningModifier.model_fields
PHRASES = [
    f"{least_squares._STAGES} stages of {least_squares._ITERATIONS_PER_STAGE} iter",
    f"from {least_squares._FIRST_PENALTY} to {least_squares._LAST_PENALTY:g} in",
    f"{least_squares._SOLVE_ITERATIONS} steps of conjugate gradients",
    rf"$\delta = {least_squares._DAMPENING}$ of its mean diagonal",
    rf"$T = {modes._COLD}^{{\min(1, p / {modes._ANNEALED})}}$",
    f"from {modes._HOT:g} down to {modes._COLD}",
    f"{WORDS[solver._CHECKS].capitalize()} times in a run",
    f"{WORDS[solver._PATIENCE]} checks without a better one",
    f"steps of {modes._SURVIVOR_STEP} standard deviations",
    f"One micro-batch in {WORDS[micro_batches._VALIDATION_ONE_IN]} is held out",
    f"{attention_pruning._STEPS[True]} steps of Adam move the survivors on",
    f"the default of {FIELDS['output_weight'].default}",
    f"`l2_penalty`, {FIELDS['l2_penalty'].default:g} by default",
    f"{MaskedRecoveryModifier.model_fields['steps'].default} steps of Adam move all",
    f"is at most {error._LARGEST_SHARE:g} times that of the median channel",
    f"up to {WORDS[gptq._SWEEPS]} sweeps",
]


@pytest.mark.parametrize("phrase", PHRASES)
def test_the_pages_constants_are_those_of_the_code(phrase):
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    assert phrase in " ".join(text.split())


def test_inline_formulas_survive_markdown():
    """GitHub reads a backslash before punctuation as Markdown's, not as LaTeX's."""
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    prose = re.sub(r"```math\n.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"\$([^$]+)\$", prose)
    assert len(inline) > 50
    assert [x for x in inline if re.search(r"\\[^A-Za-z ]", x)] == []
