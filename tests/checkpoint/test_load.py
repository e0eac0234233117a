import gc
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmc_attnmask.checkpoint.convert import to_packed
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.evaluation.perplexity import evaluate
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.checkpoints import prune_2of4, read


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The shipped model with its decoder at 2:4, dense and packed."""
    folder = tmp_path_factory.mktemp("model")
    prune_2of4(MODEL_DIR, folder / "dense")
    to_packed(folder / "dense", folder / "packed")
    to_packed(folder / "dense", folder / "any mask", storage="sparse-bitmask")
    return folder


@pytest.mark.parametrize("storage", ["packed", "any mask"])
def test_a_packed_model_equals_the_dense_one(folders, storage):
    dense = AutoModelForCausalLM.from_pretrained(folders / "dense")
    packed = load(folders / storage)
    for (name, a), (_, b) in zip(
        dense.state_dict().items(), packed.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b) and a.dtype == b.dtype, name
    assert packed.generation_config.eos_token_id == 0
    assert not packed.training
    ids = torch.arange(8)[None]
    assert torch.equal(dense(ids).logits, packed(ids).logits)


def test_a_dense_model_equals_what_transformers_loads(folders):
    expected = AutoModelForCausalLM.from_pretrained(folders / "dense")
    for a, b in zip(
        expected.parameters(), load(folders / "dense").parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_arguments_reach_transformers(folders):
    model = load(folders / "packed", dtype=torch.float32, attn_implementation="eager")
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_the_requested_revision_of_a_hub_model_is_loaded(folders, tmp_path, storage):
    """From a cache with the layout of huggingface_hub's."""
    cache = tmp_path / "models--someone--model"
    for name, source in (("main", MODEL_DIR), ("pruned", folders / storage)):
        commit = name[0] * 40
        shutil.copytree(source, cache / "snapshots" / commit)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / name).write_text(commit)
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    expected = load(folders / "dense").model.layers[0].mlp.up_proj.weight
    model = load("someone/model", revision="pruned", **hub)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


def test_a_packed_checkpoint_has_the_dense_ones_perplexity(folders, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Return the sum of a list of numbers. " * 100)
    a, b = evaluate([folders / "dense", folders / "packed"], str(text), 64)
    assert a.perplexity == b.perplexity


def test_a_missing_tensor_is_an_error_instead_of_random_weights(folders, tmp_path):
    prune_2of4(MODEL_DIR, tmp_path / "dense")
    to_packed(tmp_path / "dense", tmp_path / "packed")
    tensors = read(tmp_path / "packed")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no model\.norm\.weight"):
        load(tmp_path / "packed")


def test_a_corrupt_bitmask_is_an_error(folders, tmp_path):
    prune_2of4(MODEL_DIR, tmp_path / "dense")
    to_packed(tmp_path / "dense", tmp_path / "packed")
    tensors = read(tmp_path / "packed")
    tensors["model.layers.1.mlp.up_proj.bitmask"] += 1
    save_file(tensors, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj in .*bits"):
        load(tmp_path / "packed")


def resident(kind: str) -> int:
    """Return this process's memory in bytes: current (VmRSS) or peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{kind}:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
@pytest.mark.parametrize("storage", ["sparse-24-bitmask", "sparse-bitmask"])
def test_peak_memory_is_the_dense_model_and_one_shard(tmp_path, storage):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).bfloat16()
    size = sum(parameter.nbytes for parameter in model.parameters())
    shard = size // 8
    model.save_pretrained(tmp_path / "model", max_shard_size=shard)
    del model
    prune_2of4(tmp_path / "model", tmp_path / "dense")
    to_packed(tmp_path / "dense", tmp_path / "packed", storage=storage)
    load(tmp_path / "packed")  # imports and caches of the first call do not count
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    model = load(tmp_path / "packed")
    peak = resident("VmHWM") - before
    spare = 16e6  # pages that the allocator keeps, much less than a second copy
    assert peak < size + shard + spare, f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB"
    assert model.dtype == torch.bfloat16
