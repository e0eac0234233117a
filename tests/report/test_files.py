"""Every way of saving writes the report, and none fails because of it."""

import pytest
from loguru import logger
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmc_attnmask import AttentionMatrixPruningModifier
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.report import page

FILES = {"report.json", "report.html", "README.md"}


@pytest.fixture(scope="module")
def model(tokenizer, calibration):
    """Pruned by a call of ``oneshot``, to be saved by ``save_pretrained``."""
    loaded = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")
    modifier = AttentionMatrixPruningModifier(
        sparsity=0.5,
        mask_structure="2:4",
        steps=0,
        targets=["model.layers.0.self_attn"],
    )
    compress(loaded, tokenizer, [modifier], calibration[:2, :32])
    return loaded


def test_save_pretrained_writes_the_report_and_keeps_an_existing_card(model, tmp_path):
    (tmp_path / "README.md").write_text("# Mine")
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= FILES
    assert (tmp_path / "README.previous.md").read_text() == "# Mine"


def test_a_checkpoint_is_saved_even_if_its_report_cannot_be(
    model, tmp_path, monkeypatch
):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "render", full)
    messages: list[str] = []
    sink = logger.add(lambda line: messages.append(line.record["message"]))
    model.save_pretrained(tmp_path / "out")
    logger.remove(sink)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & FILES and not [n for n in names if n.startswith(".")]
    assert load_file(tmp_path / "out" / "model.safetensors")
    assert any("without a report and model card" in message for message in messages)
