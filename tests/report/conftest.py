"""One short run, which prunes, recovers and quantizes; the tests read its report."""

import json
from pathlib import Path

import pytest

from llmc_attnmask.oneshot.prune import prune
from llmc_attnmask.oneshot.shipped import MODEL_DIR

RECIPE = """
prune_stage:
  prune_modifiers:
    AttentionMatrixPruningModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      projections: [q, k, v, o]
      update_weights: false
      steps: 4
    SparseGPTModifier:
      {sparsity: 0.5, mask_structure: "2:4", targets: ["re:.*(gate|up|down)_proj$"]}
    MaskedRecoveryModifier: {steps: 2, targets: ["model.layers.0", "model.layers.1"]}
quant_stage:
  quant_modifiers:
    QuantizationModifier: {scheme: W8A8, targets: [Linear], ignore: ["re:.*lm_head"]}
"""


@pytest.fixture(scope="session")
def pruned(tmp_path_factory) -> Path:
    """A checkpoint that tests only read."""
    folder = tmp_path_factory.mktemp("pruned")
    (folder / "recipe.yaml").write_text(RECIPE)
    text = folder / "calibration.txt"
    text.write_text(" ".join(f"Item {i} of the list is {i * i}." for i in range(500)))
    few = {"dataset": str(text), "num_samples": 9, "max_length": 48}
    return prune(MODEL_DIR, folder / "recipe.yaml", folder / "out", **few)


@pytest.fixture
def report(pruned) -> dict:
    return json.loads((pruned / "report.json").read_text(encoding="utf-8"))
