from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llmc_attnmask.oneshot.compare import compare
from llmc_attnmask.oneshot.shipped import MODEL_DIR

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_table_has_every_method_and_ours_win(calibration, evaluation, tmp_path):
    recipes = [
        RECIPES / f"{name}.yaml"
        for name in ("attention_2of4", "attention_2of4_updated")
    ]
    rows = {
        row.method: row
        for row in compare(
            MODEL_DIR, recipes, calibration, evaluation[:64], tmp_path / "kept"
        )
    }
    baselines = ["magnitude", "Wanda", "SparseGPT"]
    ours = ["ours, 2of4", "ours, 2of4_updated"]
    assert list(rows) == ["dense", *baselines, *ours]
    assert rows["dense"].attention_error == 0 and rows["dense"].zeros < 0.01
    for method in (*baselines, *ours):
        assert rows[method].zeros == pytest.approx(0.5, abs=1e-3)
    # light mode against baselines without updates, accuracy mode against all of them
    for mine, others in ((ours[0], baselines[:2]), (ours[1], baselines)):
        least = min(rows[method].attention_error for method in others)
        assert rows[mine].attention_error < 0.6 * least
        assert rows[mine].perplexity < min(rows[m].perplexity for m in others)
    AutoModelForCausalLM.from_pretrained(tmp_path / "kept" / "attention_2of4_updated")
