import re

import pytest
import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import (
    MagnitudePruningModifier,
    SparseGPTModifier,
    WandaPruningModifier,
)
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from transformers import AutoModelForCausalLM

from llmc_attnmask import (
    ALPSPruningModifier,
    AttentionMatrixPruningModifier,
    MaskedGPTQModifier,
)
from llmc_attnmask.masks.record import get_mask
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.upstream.mask_guard import MaskBrokenError

IGNORE = ["re:.*lm_head"]
SHAPE = {"sparsity": 0.5, "mask_structure": "2:4"}
HALF = {"sparsity": 0.5, "mask_structure": "0:0"}
INT8 = {"scheme": "W8A8", "targets": ["Linear"], "ignore": IGNORE}


def tiny(path=MODEL_DIR):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def attention(**fields):
    return AttentionMatrixPruningModifier(**SHAPE | {"steps": 0} | fields)


def targets(projections: str) -> dict:
    return {"targets": [f"re:.*({projections})_proj$"]}


def few(kind):
    """Quantize only some layers, which takes most of the time of these tests."""
    return kind(**INT8 | targets("q|v"))


@pytest.fixture
def run(tokenizer, calibration):
    def compress_tiny(*modifiers, model=None):
        model = tiny() if model is None else model
        compress(model, tokenizer, list(modifiers), calibration[:4, :48])
        return model

    return compress_tiny


class FillsIn(Modifier):
    """Writes to one pruned entry of one Linear at the given stage."""

    stage: str

    def _write(self, state: State) -> None:
        linear = state.model.model.layers[2].self_attn.k_proj
        row, column = (linear.weight == 0).nonzero()[0].tolist()
        with torch.no_grad():
            linear.weight[row, column] = 1.0

    def on_initialize(self, state: State, **kwargs) -> bool:
        return True

    def on_event(self, state: State, event: Event, **kwargs) -> None:
        if event.type_.value == self.stage:
            self._write(state)

    def on_finalize(self, state: State, **kwargs) -> bool:
        if self.stage == "finalize":
            self._write(state)
        return True


@pytest.fixture
def calibrations(monkeypatch) -> list[str]:
    """The modifiers that have started to calibrate."""
    begun = []
    for kind in (AttentionMatrixPruningModifier, SparseGPTModifier, GPTQModifier):
        original = kind.on_calibration_start

        def start(self, *args, original=original, **kwargs):
            begun.append(type(self).__name__)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "on_calibration_start", start)
    return begun


@pytest.mark.parametrize(
    ("pruner", "layers"),
    [
        (attention(), 8),
        (attention(projections=["q", "k", "v", "o"]), 16),
        (ALPSPruningModifier(**SHAPE, **targets("up|down")), 8),
        (SparseGPTModifier(**HALF, **targets("v")), 4),
        (WandaPruningModifier(**SHAPE, targets=["Linear"], ignore=IGNORE), 28),
    ],
    ids=lambda value: type(value).__name__,
)
def test_stock_gptq_after_pruning_is_refused_before_anything_is_calibrated(
    run, calibrations, pruner, layers
):
    message = (
        rf"^GPTQModifier would overwrite the pruned entries of {layers} layers \(model"
        rf".*pruned by {type(pruner).__name__}; use MaskedGPTQModifier"
    )
    with pytest.raises(MaskBrokenError, match=message):
        run(pruner, GPTQModifier(**INT8))
    assert not calibrations


@pytest.mark.parametrize("shape", [SHAPE, HALF], ids=["2:4", "half"])
def test_stock_gptq_on_a_checkpoint_that_an_earlier_run_pruned_is_refused(
    run, calibrations, shape, tmp_path
):
    run(SparseGPTModifier(**shape, **targets("gate"))).save_pretrained(tmp_path)
    calibrations.clear()
    message = r"of 4 layers \(model.layers.0.mlp.gate_proj.*pruned by an earlier run"
    with pytest.raises(MaskBrokenError, match=message):
        run(GPTQModifier(**INT8), model=tiny(tmp_path))
    assert not calibrations
    saved = tiny(tmp_path)
    run(MaskedGPTQModifier(**INT8 | targets("gate")), model=saved)
    assert (get_mask(saved.model.layers[1].mlp.gate_proj).float().mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    "stage",
    ["calibration_start", "sequential_epoch_end", "calibration_end", "finalize"],
)
def test_a_modifier_that_fills_in_an_entry_is_named_with_the_layer_and_the_count(
    run, stage
):
    model = tiny()
    message = (
        r"^FillsIn has overwritten 1 of the \d+ pruned entries of "
        r"model\.layers\.2\.self_attn\.k_proj; .* MaskedGPTQModifier"
    )
    with pytest.raises(MaskBrokenError, match=message):
        run(attention(), FillsIn(stage=stage), SmoothQuantModifier(), model=model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_rotation_after_pruning_is_detected(run):
    with pytest.raises(MaskBrokenError, match=r"^SpinQuantModifier has overwritten"):
        run(
            attention(),
            SpinQuantModifier(rotations=["R1"], transform_type="random-matrix"),
        )


def test_a_second_pruning_of_a_layer_may_prune_more_but_not_less(run):
    more = WandaPruningModifier(sparsity=0.75, **targets("q"))
    model = run(attention(), more)
    linear = model.model.layers[0].self_attn.q_proj
    assert get_mask(linear).float().mean() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(get_mask(linear), linear.weight != 0)
    less = SparseGPTModifier(**SHAPE, **targets("q"))
    message = r"^SparseGPTModifier has overwritten .* or set its preserve_sparsity_mask"
    with pytest.raises(MaskBrokenError, match=message):
        run(attention(mask_structure="0:0"), less)


@pytest.mark.parametrize(
    "recipe",
    [
        lambda: [few(GPTQModifier)],
        lambda: [attention(), QuantizationModifier(**INT8)],
        lambda: [attention(), few(MaskedGPTQModifier)],
        lambda: [attention(), GPTQModifier(**INT8 | targets("gate"))],
        lambda: [few(GPTQModifier), SparseGPTModifier(**SHAPE, **targets("v"))],
        lambda: [attention(), SparseGPTModifier(**SHAPE, **targets("v|o|gate"))],
        lambda: [
            SmoothQuantModifier(),
            SparseGPTModifier(**SHAPE, **targets("q|k|v|o|gate|up|down")),
            SmoothQuantModifier(),
            few(MaskedGPTQModifier),
        ],
        lambda: [SparseGPTModifier(sparsity=0.0, **targets("v")), few(GPTQModifier)],
        lambda: [
            MagnitudePruningModifier(
                targets=["re:.*v_proj.weight"], init_sparsity=0.5, final_sparsity=0.5
            ),
            few(GPTQModifier),
        ],
    ],
    ids=[
        "GPTQ on a dense model",
        "round to nearest",
        "masked GPTQ",
        "GPTQ of other layers",
        "pruning after GPTQ",
        "two pruners",
        "scaling before and after",
        "nothing pruned",
        "a pruner for training only",
    ],
)
def test_recipes_that_keep_their_masks_raise_no_alarm(run, recipe):
    run(*recipe())


def test_weights_that_are_loaded_after_pruning_raise_no_alarm(run):
    model = tiny()
    dense = {k: v.clone() for k, v in model.state_dict().items()}
    run(attention(), model=model)
    model.load_state_dict(dense)
    run(few(GPTQModifier), model=model)


def test_a_checkpoint_of_rounded_weights_is_not_mistaken_for_a_pruned_one(run):
    model = tiny()
    for name, weight in model.named_parameters():
        if re.search("_proj", name):
            step = weight.data.abs().amax(dim=1, keepdim=True) / 2
            weight.data = (weight.data / step).round() * step
    assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() > 0.4
    run(few(GPTQModifier), model=model)


@pytest.mark.parametrize("pipeline", ["sequential", "independent"])
def test_masks_are_watched_in_every_pipeline(pipeline, calibration):
    from datasets import Dataset
    from llmcompressor import oneshot

    def once(*modifiers):
        oneshot(
            model=tiny(),
            dataset=Dataset.from_dict({"input_ids": calibration[:2, :32].tolist()}),
            recipe=list(modifiers),
            pipeline=pipeline,
            num_calibration_samples=2,
            max_seq_length=32,
        )

    once(attention(), few(MaskedGPTQModifier))
    with pytest.raises(MaskBrokenError, match=r"^FillsIn has overwritten 1 of"):
        once(attention(), FillsIn(stage="calibration_end"))
