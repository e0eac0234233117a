"""A run logs a line per layer, the time left, and a summary."""

import re

from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from loguru import logger
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmc_attnmask import (
    ALPSPruningModifier,
    AttentionMatrixPruningModifier,
    MaskedRecoveryModifier,
)
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.runlog import context
from llmc_attnmask.runlog.context import RunContext, described
from llmc_attnmask.runlog.journal import run_metadata


def metrics(tokenizer, calibration: Tensor, *modifiers) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")
    lines: list[str] = []
    sink = logger.add(
        lambda line: lines.append(line.record["message"]),
        filter=lambda record: record["level"].name == "METRIC",
    )
    compress(model, tokenizer, list(modifiers), calibration[:8, :32])
    logger.remove(sink)
    return lines


def test_every_layer_logs_a_line_and_a_summary_follows(tokenizer, calibration):
    fields = {"sparsity": 0.5, "mask_structure": "2:4"}
    attention = AttentionMatrixPruningModifier(**fields, steps=0)
    rest = ALPSPruningModifier(**fields, targets=["re:.*(up|down)_proj$"])
    recovery = MaskedRecoveryModifier(steps=1, targets=["model.layers.3"])
    *lines, summary = metrics(tokenizer, calibration, attention, rest, recovery)
    assert len(lines) == 4 + 8 + 1
    number = r"\d+\.\d{5}"
    common = r"50\.\d% zeros, \d+\.\d s, peak \d+\.\d\d GB"
    left = r"about \d+ s left"
    then = "then ALPSPruningModifier and MaskedRecoveryModifier"
    assert re.fullmatch(
        rf"model\.layers\.0\.self_attn: q and k error {number} -> {number}, {common}; "
        rf"{left}, {then}",
        lines[0],
    )
    assert lines[3].endswith(f"; {then}")  # the modifier's last layer
    assert re.fullmatch(
        rf"model\.layers\.0\.mlp\.up_proj: output error {number}, {common}; {left}, "
        "then MaskedRecoveryModifier",
        lines[4],
    )
    assert re.fullmatch(
        rf"model\.layers\.3: block output error {number} -> {number}, {common}",
        lines[-1],
    )
    assert summary.startswith("summary\n  AttentionMatrixPruningModifier: 4 layers, q ")
    assert "ALPSPruningModifier: 8 layers, output error 0." in summary
    assert "llmc-attnmask eval DIR --reference MODEL" in summary


def test_time_left_is_the_mean_time_of_measured_layers_times_the_layers_ahead(
    monkeypatch,
):
    now = [100.0]
    monkeypatch.setattr(context.time, "perf_counter", lambda: now[0])
    first = ALPSPruningModifier(sparsity=0.5)
    second = MaskedRecoveryModifier()
    run = RunContext([first, SparseGPTModifier(sparsity=0.5), second])
    run.expect(first, 4)
    run.expect(second, 2)
    now[0] += 50  # time for loading, before the pass
    run.start_clock()
    run.layer_restored(first)
    now[0] += 10
    then = "then SparseGPTModifier and MaskedRecoveryModifier"
    assert run.layer_done(first) == f"about 20 s left, {then}"
    now[0] += 30
    assert run.layer_done(first) == f"about 20 s left, {then}"
    now[0] += 1000
    run.start_clock()
    now[0] += 3600
    assert run.layer_done(second) == "about 60 min left"  # one of 20 s, one of 1 h
    run.close()


def test_warnings_during_a_run_are_recorded_once_and_later_ones_are_not(
    tokenizer, calibration
):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")

    class Warner(MaskedRecoveryModifier):
        def on_calibration_start(self, *args, **kwargs):
            logger.warning("something is odd")
            logger.warning("something is odd")
            logger.info("all is well")
            super().on_calibration_start(*args, **kwargs)

    pruner = AttentionMatrixPruningModifier(sparsity=0.5, steps=0)
    compress(model, tokenizer, [pruner, Warner(steps=1)], calibration[:2, :32])
    logger.warning("another matter")
    noted = [w for w in run_metadata(model)["warnings"] if "accelerator" not in w]
    assert noted == ["something is odd"]


def test_modifiers_are_described_including_fields_left_at_their_defaults():
    (found,) = described([MaskedRecoveryModifier(steps=7)])
    assert found["name"] == "MaskedRecoveryModifier"
    assert found["fields"]["steps"] == 7 and found["fields"]["seed"] == 0
    assert "group" not in found["fields"]
