import pytest
import torch
from llmcompressor.modifiers.gptq import base as stock
from llmcompressor.modifiers.quantization import GPTQModifier
from torch import distributed, multiprocessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc_attnmask import MaskedGPTQModifier
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.shipped import MODEL_DIR

IGNORE = ["re:.*lm_head"]
LINEARS = "re:.*layers.*_proj$"


def tiny(*, pruned: bool):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")
    structure = MaskStructure.parse("2:4")
    for name, weight in model.named_parameters():
        if "_proj" in name:
            weight.data[weight.data == 0] = 1e-4  # every zero is then pruned
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
def test_a_dense_model_is_quantized_bit_for_bit_as_by_stock_gptq(run, scheme):
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
    reloaded(torch.arange(8)[None])  # some weights are decompressed on first use
    for name, kept in masks.items():
        weight = reloaded.get_parameter(name)
        assert not (weight.float() != 0)[~kept].any()
        assert (weight.float() != 0)[kept].float().mean() > 0.7


def test_the_stock_function_is_restored_after_a_run_and_after_a_failure(
    run, monkeypatch
):
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


def quantize_on_rank(rank: int, folder: str) -> None:
    """Run one of two ranks, on its own half of the data."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    model = tiny(pruned=True)
    torch.manual_seed(rank)
    modifier = MaskedGPTQModifier(scheme="W8A8", targets=["re:.*[01].*[qv]_proj$"])
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    compress(model, tokenizer, [modifier], torch.randint(10, 2000, (4, 32)))
    distributed.barrier()
    torch.save(weights(model), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_agree_and_both_keep_the_masks(tmp_path):
    multiprocessing.spawn(quantize_on_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    before = weights(tiny(pruned=True))
    changed = [name for name in before if not torch.equal(first[name], before[name])]
    assert len([name for name in changed if "_proj" in name]) == 4
    for name in before:
        assert torch.equal(first[name], second[name])
        assert not first[name][before[name] == 0].any()
