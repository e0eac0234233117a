"""Models and calibration activations on disk give bit-identical results."""

import gc
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import (
    get_offloaded_device,
    load_offloaded_model,
    update_offload_parameter,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmc_attnmask import AttentionMatrixPruningModifier
from llmc_attnmask.checkpoint.convert import to_packed
from llmc_attnmask.oneshot.compress import compress, set_defaults
from llmc_attnmask.oneshot.prune import prune
from llmc_attnmask.oneshot.recipe import load_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.checkpoints import prune_2of4

RECIPE = """
prune_stage:
  attention_modifiers:
    AttentionMatrixPruningModifier: {sparsity: 0.5, mask_structure: "2:4", steps: 2}
  rest_modifiers:
    SparseGPTModifier:
      {sparsity: 0.5, mask_structure: "2:4", targets: ["re:.*(v|o|gate|up|down)_proj$"]}
  recovery_modifiers:
    MaskedRecoveryModifier: {steps: 2, storage: sparse-24-bitmask}
quant_stage:
  quant_modifiers:
    ActivationSmoothingModifier: {}
    MaskedGPTQModifier: {scheme: W8A8, targets: ["re:.*layers.0.*_proj$"]}
"""
FEW = {"num_samples": 6, "max_length": 64}


def attention(offload: str) -> AttentionMatrixPruningModifier:
    return AttentionMatrixPruningModifier(
        sparsity=0.5, mask_structure="2:4", steps=2, offload_activations=offload
    )


@pytest.fixture
def on_disk(tmp_path):
    """The shipped model with every tensor on disk."""
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


def test_model_and_activations_on_disk_give_the_same_bytes_as_in_memory(
    tmp_path, monkeypatch
):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    files = [
        prune(
            MODEL_DIR,
            tmp_path / "recipe.yaml",
            tmp_path / f"on {place}",
            offload_model=place,
            offload_activations=place,
            **FEW,
        )
        / "model.safetensors"
        for place in ("cpu", "disk")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert any(name.endswith(".bitmask") for name in load_file(files[0]))
    assert not list((tmp_path / "temporary").iterdir())


def test_offloading_a_packed_model_is_refused(tmp_path):
    packed = tmp_path / "packed"
    to_packed(prune_2of4(MODEL_DIR, tmp_path / "dense"), packed)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(ValueError, match="packed, so it cannot be offloaded to disk"):
        prune(packed, recipe, tmp_path / "out", offload_model="disk", **FEW)
    assert not (tmp_path / "out").exists()


def test_the_recipe_takes_precedence_on_where_activations_are_kept(tmp_path):
    fields = "sparsity: 0.5, offload_activations: cpu"
    (tmp_path / "recipe.yaml").write_text(
        f"a_stage: {{b_modifiers: {{AttentionMatrixPruningModifier: {{{fields}}}, "
        "MaskedRecoveryModifier: {}}}"
    )
    modifiers = load_recipe(tmp_path / "recipe.yaml").modifiers
    set_defaults(modifiers, 0, "disk")
    assert [m.offload_activations for m in modifiers] == ["cpu", "disk"]


def test_a_broken_weight_on_disk_is_refused(on_disk, tokenizer, calibration):
    linear = on_disk.model.layers[1].mlp.up_proj
    update_offload_parameter(linear, "weight", linear.weight.detach() * torch.nan)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight has \d+ NaN"):
        compress(on_disk, tokenizer, [attention("cpu")], calibration[:2])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_failed_run_leaves_no_activations_in_memory_or_on_disk(
    in_memory, tokenizer, calibration, monkeypatch, tmp_path
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(
        "llmc_attnmask.modifiers.attention_pruning.learn_masks",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt(open_files())),
    )
    before = open_files()
    with pytest.raises(KeyboardInterrupt) as interrupt:
        compress(in_memory, tokenizer, [attention("disk")], calibration[:2])
    during = interrupt.value.args[0]
    del interrupt
    gc.collect()
    assert during > before >= open_files()
    assert not list(tmp_path.iterdir())
