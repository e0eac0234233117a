import pytest
import torch
from llmcompressor.modifiers.gptq import base as stock
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM

from llmc_attnmask import MaskedGPTQModifier
from llmc_attnmask.builtin import MODEL_DIR
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.pruning import compress

IGNORE = ["re:.*lm_head"]
LINEARS = "re:.*layers.*_proj$"


def tiny(*, pruned: bool):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")
    structure = MaskStructure.parse("2:4")
    for name, weight in model.named_parameters():
        if "_proj" in name:
            weight.data[weight.data == 0] = 1e-4  # so that zeros are pruned ones
            if pruned:
                kept = structure.mask(weight.abs(), 0.5)
                weight.data.masked_fill_(~kept, 0.0)
    return model


@pytest.fixture
def run(tokenizer, calibration):
    def quantize(modifier, *, pruned: bool, samples: int = 8):
        model = tiny(pruned=pruned)
        compress(model, tokenizer, [modifier], calibration[:samples, :64])
        return model

    return quantize


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_a_dense_model_is_quantized_as_by_stock_bit_for_bit(run, scheme):
    fields = {"scheme": scheme, "targets": ["Linear"], "ignore": IGNORE}
    if scheme == "W4A16":  # groups of 128 do not fit the tiny model
        fields = {"config_groups": {"all": group(64)}, "ignore": IGNORE}
    ours = weights(run(MaskedGPTQModifier(**fields), pruned=False))
    theirs = weights(run(GPTQModifier(**fields), pruned=False))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    dense = weights(tiny(pruned=False))
    assert any(not torch.equal(ours[n], dense[n]) for n in dense if "_proj" in n)


def group(size: int, **more) -> dict:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size}
    return {"targets": ["Linear"], "weights": weights | {"symmetric": True} | more}


@pytest.mark.parametrize(
    "fields",
    [
        {"config_groups": {"all": group(64)}},
        {"config_groups": {"all": group(64, symmetric=False)}},
        {"config_groups": {"all": group(64, symmetric=False, actorder="weight")}},
        {"config_groups": {"all": group(64, num_bits=8)}, "actorder": None},
        {"scheme": "W8A8", "targets": ["Linear"], "batched_quantization": 4},
        {"scheme": "FP8", "targets": ["Linear"]},
        {"scheme": "FP8_DYNAMIC", "targets": ["Linear"], "block_size": 48},
    ],
    ids=str,
)
def test_masks_survive_in_memory_and_through_a_saved_checkpoint(run, fields, tmp_path):
    masks = {n: w != 0 for n, w in weights(tiny(pruned=True)).items() if "_proj" in n}
    model = run(MaskedGPTQModifier(**fields, ignore=IGNORE), pruned=True)
    for name, weight in weights(model).items():
        if name in masks:
            assert not weight[~masks[name]].view(torch.int16).any()  # no -0.0 either
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    reloaded(torch.arange(8)[None])  # decompresses what is decompressed on first use
    for name, kept in masks.items():
        weight = reloaded.get_parameter(name)
        assert not (weight.float() != 0)[~kept].any()
        assert (weight.float() != 0)[kept].float().mean() > 0.7


def test_the_stock_function_is_back_after_a_run_and_after_a_failure(run, monkeypatch):
    original = stock.quantize_weight
    fields = {"scheme": "W8A8", "targets": ["Linear"], "ignore": IGNORE}
    run(MaskedGPTQModifier(**fields), pruned=True, samples=1)
    assert stock.quantize_weight is original

    def fail(**_):
        raise MemoryError("no room")

    monkeypatch.setattr("llmc_attnmask.modifiers.masked_gptq.quantize_weight", fail)
    with pytest.raises(MemoryError):
        run(MaskedGPTQModifier(**fields), pruned=True, samples=1)
    assert stock.quantize_weight is original
