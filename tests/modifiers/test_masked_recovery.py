import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedModel,
)

from llmc_attnmask import (
    ALPSPruningModifier,
    AttentionMatrixPruningModifier,
    MaskedGPTQModifier,
    MaskedRecoveryModifier,
)
from llmc_attnmask.evaluation.perplexity import perplexity
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.shipped import MODEL_DIR

TWO_OF_FOUR = {"sparsity": 0.5, "mask_structure": "2:4"}
LINEARS = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}


def tiny() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")


@pytest.fixture
def run(tokenizer, calibration):
    def prune(*modifiers, samples: int = 16, model=None) -> PreTrainedModel:
        model = tiny() if model is None else model
        compress(model, tokenizer, list(modifiers), calibration[:samples])
        return model

    return prune


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: w for n, w in model.state_dict().items() if n.endswith("_proj.weight")}


PRUNERS = {
    "ours": lambda: AttentionMatrixPruningModifier(
        update_weights=False, steps=4, **TWO_OF_FOUR
    ),
    "alps": lambda: ALPSPruningModifier(**TWO_OF_FOUR),
    "sparsegpt": lambda: SparseGPTModifier(**TWO_OF_FOUR, **LINEARS),
    "wanda": lambda: WandaPruningModifier(**TWO_OF_FOUR, **LINEARS),
}


@pytest.mark.parametrize("pruner", PRUNERS)
def test_every_pruners_masks_stay_and_perplexity_falls(run, evaluation, pruner):
    before = run(PRUNERS[pruner]())
    after = run(PRUNERS[pruner](), MaskedRecoveryModifier(steps=48))
    dense = weights(tiny())
    for name, weight in weights(after).items():
        zeros = weights(before)[name] == 0
        assert torch.equal(weight == 0, zeros)
        assert not torch.signbit(weight[zeros]).any()
        if not (zeros & (dense[name] != 0)).any():  # what was not pruned is not changed
            assert torch.equal(weight, dense[name])
    ppl = [perplexity(m.float().eval(), evaluation[:48]) for m in (before, after)]
    assert ppl[1] < ppl[0]


def test_recovery_also_works_in_the_sequential_pipeline(
    tokenizer, calibration, evaluation
):
    from datasets import Dataset

    models = []
    for recovery in ([], [MaskedRecoveryModifier(steps=4)]):
        model = tiny()
        windows = calibration[:16]
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=Dataset.from_dict({"input_ids": windows.tolist()}),
            recipe=[SparseGPTModifier(**TWO_OF_FOUR, **LINEARS), *recovery],
            pipeline="sequential",
            max_seq_length=windows.shape[1],
            num_calibration_samples=len(windows),
            shuffle_calibration_samples=False,
        )
        models.append(model.float().eval())
    before, after = (perplexity(m, evaluation[:48]) for m in models)
    assert after < before


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
def test_a_later_quantization_in_the_recipe_gets_the_recovered_weights(
    run, calibration, pipeline
):
    from datasets import Dataset

    model = tiny()
    quantization = MaskedGPTQModifier(scheme="W8A8", targets=["re:.*layers.0.*_proj$"])
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": calibration[:8].tolist()}),
        recipe=[PRUNERS["wanda"](), MaskedRecoveryModifier(steps=20), quantization],
        pipeline=pipeline,
        shuffle_calibration_samples=False,
    )
    linear = model.model.layers[0].mlp.up_proj
    assert linear.quantization_scheme
    # Wanda leaves survivors unchanged, and rounding to 8 bits changes them little
    dense = tiny().model.layers[0].mlp.up_proj.weight
    kept = linear.weight != 0
    changed = (linear.weight - dense)[kept].norm() / dense[kept].norm()
    assert changed > 0.05


def test_ignored_blocks_stay_unchanged_and_pass_on_the_dense_stream(run):
    before = run(PRUNERS["wanda"]())
    recovery = MaskedRecoveryModifier(steps=2, ignore="re:.*layers.1$")
    after = run(PRUNERS["wanda"](), recovery)
    changed = {
        int(name.split(".")[2])
        for name, weight in weights(after).items()
        if not torch.equal(weight, weights(before)[name])
    }
    assert changed == {0, 2, 3}


def test_the_same_seed_gives_the_same_bytes(run):
    first, second = (
        weights(run(PRUNERS["alps"](), MaskedRecoveryModifier(steps=3)))
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recovery_without_a_pruner_is_refused(run):
    with pytest.raises(ValueError, match="put a pruning modifier before"):
        run(MaskedRecoveryModifier(steps=1))


def test_recovery_after_quantization_is_refused(run):
    quantizer = MaskedGPTQModifier(scheme="W8A8", **LINEARS)
    with pytest.raises(ValueError, match=r"after MaskedGPTQModifier .* put it before"):
        run(PRUNERS["wanda"](), quantizer, MaskedRecoveryModifier())


def test_an_attention_weight_is_refused_where_attention_cannot_be_captured(run):
    config = BloomConfig(vocab_size=2048, hidden_size=32, n_layer=1, n_head=4)
    bloom = BloomForCausalLM(config)
    bloom.config.name_or_path = str(MODEL_DIR)
    with pytest.raises(ValueError, match=r"BloomAttention .* attention_weight to 0"):
        run(MaskedRecoveryModifier(attention_weight=0.1), model=bloom)


def test_a_model_that_is_already_pruned_is_refused(run):
    pruned = run(PRUNERS["wanda"]())
    with pytest.raises(ValueError, match="recovery needs the dense model"):
        run(MaskedRecoveryModifier(steps=1), model=pruned)


def test_targets_that_match_no_block_are_refused(run):
    recovery = MaskedRecoveryModifier(steps=1, targets="re:.*q_proj$")
    with pytest.raises(ValueError, match="match no decoder block"):
        run(PRUNERS["wanda"](), recovery)


def test_a_failed_run_leaves_no_hook_and_no_dense_copy(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(
        "llmc_attnmask.recovery.refine.descend",
        lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")),
    )
    model = tiny()
    with pytest.raises(RuntimeError, match="power cut"):
        run(PRUNERS["wanda"](), MaskedRecoveryModifier(steps=1), model=model)
    assert not list(tmp_path.glob("dense-blocks-*"))
    assert all(not m._forward_pre_hooks for m in model.modules())
