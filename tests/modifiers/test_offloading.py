"""Models and calibration activations on disk: the results are the same to the bit."""

import gc
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import (
    get_offloaded_device,
    load_offloaded_model,
    update_offload_parameter,
)
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmc_attnmask import (
    AttentionMatrixPruningModifier,
    MaskedGPTQModifier,
    MaskedRecoveryModifier,
)
from llmc_attnmask.builtin import MODEL_DIR
from llmc_attnmask.pruning import compress, save

TWO_OF_FOUR = {"sparsity": 0.5, "mask_structure": "2:4"}


def modifiers(offload: str) -> list:
    kept = {"offload_activations": offload}
    return [
        AttentionMatrixPruningModifier(steps=2, **TWO_OF_FOUR, **kept),
        SparseGPTModifier(**TWO_OF_FOUR, targets=["re:.*(v|o|gate|up|down)_proj$"]),
        MaskedRecoveryModifier(steps=2, **kept),
        MaskedGPTQModifier(scheme="W8A8", targets=["re:.*layers.0.*_proj$"]),
    ]


@pytest.fixture
def on_disk(tmp_path):
    """The shipped model, every tensor of it on disk."""
    with load_offloaded_model():
        model = AutoModelForCausalLM.from_pretrained(
            MODEL_DIR,
            dtype="auto",
            device_map={"": "disk"},
            offload_folder=tmp_path / "offloaded",
        )
    linear = model.model.layers[0].self_attn.q_proj
    assert get_offloaded_device(linear) == "disk"
    return model


@pytest.fixture
def in_memory() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")


def test_model_and_activations_on_disk_give_the_bytes_of_those_in_memory(
    in_memory, on_disk, tokenizer, calibration, tmp_path
):
    storage = "sparse-24-bitmask"
    for model, offload, name in ((in_memory, "cpu", "a"), (on_disk, "disk", "b")):
        compress(model, tokenizer, modifiers(offload), calibration[:6])
        save(model, tokenizer, tmp_path / name, storage)
    files = [tmp_path / name / "model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert any(name.endswith(".bitmask") for name in load_file(files[0]))


def test_a_broken_weight_on_disk_is_refused(on_disk, tokenizer, calibration):
    linear = on_disk.model.layers[1].mlp.up_proj
    update_offload_parameter(linear, "weight", linear.weight.detach() * torch.nan)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight has \d+ NaN"):
        compress(on_disk, tokenizer, modifiers("cpu")[:1], calibration[:2])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_activations_are_off_memory_and_off_disk_when_a_run_fails(
    in_memory, tokenizer, calibration, monkeypatch, tmp_path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(
        "llmc_attnmask.modifiers.attention_pruning.learn_masks",
        lambda _, inputs, *__: (_ for _ in ()).throw(KeyboardInterrupt(open_files())),
    )
    before = open_files()
    with pytest.raises(KeyboardInterrupt) as interrupt:
        compress(in_memory, tokenizer, modifiers("disk")[:1], calibration[:2])
    during = interrupt.value.args[0]
    del interrupt
    gc.collect()
    assert during > before >= open_files()
    assert not list(tmp_path.iterdir())
