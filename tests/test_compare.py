from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llmc_attnmask.builtin import MODEL_DIR
from llmc_attnmask.compare import compare

RECIPES = Path(__file__).parents[1] / "recipes"


def test_the_table_has_every_method_and_ours_wins(calibration, evaluation, tmp_path):
    recipe = RECIPES / "attention_2of4.yaml"
    rows = {
        row.method: row
        for row in compare(
            MODEL_DIR, recipe, calibration, evaluation[:64], tmp_path / "kept"
        )
    }
    assert list(rows) == ["dense", "magnitude", "Wanda", "SparseGPT", "ours"]
    assert rows["dense"].attention_error == 0 and rows["dense"].zeros < 0.01
    for method in ("magnitude", "Wanda", "SparseGPT", "ours"):
        assert rows[method].zeros == pytest.approx(0.5, abs=1e-3)
    peers = [rows[m] for m in ("magnitude", "Wanda")]
    assert rows["ours"].attention_error < 0.6 * min(r.attention_error for r in peers)
    assert rows["ours"].perplexity < min(r.perplexity for r in peers)
    AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
