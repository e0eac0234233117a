import pytest
import torch
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from transformers import AutoModelForCausalLM

from llmc_attnmask import ALPSPruningModifier
from llmc_attnmask.evaluation.perplexity import perplexity
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.shipped import MODEL_DIR

IGNORE = ["re:.*lm_head"]


def pruned(tokenizer, windows, *modifiers):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")
    compress(model, tokenizer, list(modifiers), windows)
    return model.float().eval()


@pytest.mark.parametrize("structure, sparsity", [("2:4", 0.5), ("0:0", 0.6)])
def test_a_whole_model_has_a_lower_perplexity_than_with_sparsegpt(
    tokenizer, calibration, evaluation, structure, sparsity
):
    fields = {"sparsity": sparsity, "mask_structure": structure}
    ours = pruned(tokenizer, calibration, ALPSPruningModifier(**fields))
    theirs = pruned(
        tokenizer,
        calibration,
        SparseGPTModifier(targets=["Linear"], ignore=IGNORE, **fields),
    )
    for name, module in ours.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            zeros = module.weight == 0
            assert not torch.signbit(module.weight[zeros]).any()
            if structure == "2:4":
                assert (zeros.view(-1, 4).sum(-1) >= 2).all()
            else:
                assert zeros.float().mean().item() == pytest.approx(0.6, abs=1e-3)
    assert (ours.lm_head.weight != 0).all()
    assert perplexity(ours, evaluation[:48]) < perplexity(theirs, evaluation[:48])


def test_targets_and_ignore_select_linears(tokenizer, calibration):
    before = AutoModelForCausalLM.from_pretrained(MODEL_DIR).state_dict()
    after = pruned(
        tokenizer,
        calibration[:4],
        ALPSPruningModifier(
            sparsity=0.5, targets="re:.*up_proj$", ignore="re:.*layers.0.*"
        ),
    ).state_dict()
    changed = {n for n in before if not torch.equal(before[n].float(), after[n])}
    assert changed == {f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2, 3)}


def test_targets_that_match_no_linear_are_refused(tokenizer, calibration):
    with pytest.raises(ValueError, match="match no Linear"):
        pruned(
            tokenizer,
            calibration[:2],
            ALPSPruningModifier(sparsity=0.5, targets=["re:.*qproj"]),
        )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sparsity": 1.0}, "in \\[0, 1\\)"),
        ({"sparsity": 0.6, "mask_structure": "2:4"}, "contradicts"),
        ({"sparsity": 0.5, "mask_structure": 124}, "quotes"),
        ({"sparsity": 0.5, "block_size": 128}, "Extra inputs"),
    ],
)
def test_invalid_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ALPSPruningModifier(**fields)


def test_indivisible_in_features_are_refused_before_anything_is_pruned(
    tokenizer, calibration
):
    with pytest.raises(ValueError, match="not divisible by 7"):
        pruned(
            tokenizer,
            calibration[:2],
            ALPSPruningModifier(sparsity=3 / 7, mask_structure="3:7"),
        )
