import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from llmc_attnmask.checkpoint import marker
from llmc_attnmask.checkpoint.convert import to_dense
from llmc_attnmask.checkpoint.inspect import inspect
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.checkpoint.selection import CheckpointWarning
from llmc_attnmask.checkpoint.store import mark
from llmc_attnmask.oneshot.prune import prune
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.checkpoints import config_of, digests, prune_2of4, write

QUICK = {"num_samples": 4, "max_length": 64}
PRUNE = """
prune_stage:
  attention_modifiers:
    AttentionMatrixPruningModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      update_weights: false
      steps: 0{storage}
"""
REST = """
  rest_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      targets: ["re:.*(v|o|gate|up|down)_proj$"]
"""
QUANTIZE = """
quant_stage:
  quant_modifiers:
    QuantizationModifier: {{scheme: {scheme}, targets: [Linear], ignore: ["lm_head"]}}
"""


def written(
    folder: Path, scheme: str | None = None, storage: str = "", rest=True
) -> Path:
    storage = f"\n      storage: {storage}" if storage else ""
    text = PRUNE.format(storage=storage) + (REST if rest else "")
    text += QUANTIZE.format(scheme=scheme) if scheme else ""
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def windows() -> Dataset:
    ids = torch.arange(4 * 64).view(4, 64) % 200
    return Dataset.from_dict({"input_ids": ids.tolist()})


@pytest.mark.parametrize("scheme", [None, "W8A8", "FP8_DYNAMIC"])
def test_oneshot_and_prune_write_the_storage_that_the_recipe_requests(scheme, tmp_path):
    recipe = written(tmp_path, scheme, "sparse-24-bitmask")
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    by_oneshot = tmp_path / "oneshot"
    oneshot(
        model=model,
        dataset=windows(),
        recipe=str(recipe),
        output_dir=str(by_oneshot),
        shuffle_calibration_samples=False,
    )
    by_prune = prune(MODEL_DIR, recipe, tmp_path / "prune", **QUICK)
    dtype = {None: "bfloat16", "W8A8": "int8", "FP8_DYNAMIC": "float8_e4m3fn"}[scheme]
    for folder in (by_oneshot, by_prune):
        layers = [x for x in inspect(folder) if x.two_of_four]
        assert len(layers) == 28
        assert {x.format for x in layers} == {f"{dtype} sparse-24-bitmask"}
        quantization = config_of(folder)["quantization_config"]
        assert len(quantization["sparsity_config"]["targets"]) == 28
        formats = {"W8A8": "int-quantized", "FP8_DYNAMIC": "float-quantized"}
        assert quantization.get("format") == formats.get(scheme)
        names = {path.name for path in folder.iterdir()}
        assert {"recipe.yaml", "tokenizer.json", "model.safetensors"} <= names
        assert not [name for name in names if name.startswith(".")]
    to_dense(by_prune, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ids = torch.arange(8)[None]
    logits = dense(ids).logits
    assert logits.isfinite().all()
    assert torch.equal(load(by_prune)(ids).logits, logits)


@pytest.mark.parametrize("scheme", [None, "W8A8"])
def test_dense_storage_has_the_marker_and_the_same_contents_as_packed_storage(
    scheme, tmp_path
):
    recipe = written(tmp_path, scheme)
    dense = prune(MODEL_DIR, recipe, tmp_path / "dense", **QUICK)
    assert len(marker.read(config_of(dense))) == 28
    packed = prune(
        MODEL_DIR, recipe, tmp_path / "packed", **QUICK, storage="sparse-24-bitmask"
    )
    to_dense(packed, tmp_path / "restored")
    assert digests(tmp_path / "restored") == digests(dense)
    config = config_of(tmp_path / "restored")
    assert set(marker.read(config)) == set(marker.read(config_of(dense)))
    if scheme:
        expected = config_of(dense)["quantization_config"]
        expected.pop("sparsity_config", None)
        assert config["quantization_config"] == expected


def test_a_model_with_only_q_and_k_at_2of4_is_saved_dense_with_the_reason(tmp_path):
    recipe = written(tmp_path, storage="sparse-24-bitmask", rest=False)
    with pytest.warns(CheckpointWarning) as caught:
        saved = prune(MODEL_DIR, recipe, tmp_path / "out", **QUICK)
    messages = [str(warning.message) for warning in caught]
    assert any("servers fuse them with" in message for message in messages)
    assert any("saved dense" in message for message in messages)
    assert len(marker.read(config_of(saved))) == 8  # q and k of four layers


def test_w4a16_cannot_be_packed_and_stays_as_it_is(tmp_path):
    recipe = written(tmp_path, "W4A16", "sparse-24-bitmask")
    weights = "{num_bits: 4, strategy: group, group_size: 64}"
    groups = f"config_groups: {{g: {{targets: [Linear], weights: {weights}}}}}"
    recipe.write_text(
        recipe.read_text().replace("scheme: W4A16, targets: [Linear]", groups)
    )
    with pytest.warns(CheckpointWarning, match="W4A16.*saved dense"):
        saved = prune(MODEL_DIR, recipe, tmp_path / "out", **QUICK)
    assert config_of(saved)["quantization_config"]["format"] == "pack-quantized"
    assert {x.format for x in inspect(saved)} == {"packed", "bfloat16"}


def test_unstructured_layers_are_marked_as_such(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "s_stage: {m_modifiers: {AttentionMatrixPruningModifier: "
        "{sparsity: 0.5, steps: 0}}}"
    )
    saved = prune(MODEL_DIR, path, tmp_path / "out", **QUICK)
    config = config_of(saved)
    assert marker.read(config) == []
    marked = marker.read_unstructured(config)
    assert len(marked) == 8  # q and k of four layers
    assert all(name.endswith(("q_proj", "k_proj")) for name in marked)


@pytest.mark.parametrize("scheme", [None, "W8A8"])
def test_layers_with_any_mask_are_packed_if_the_recipe_requests_it(scheme, tmp_path):
    recipe = written(tmp_path, scheme, rest=False)
    text = recipe.read_text().replace('mask_structure: "2:4"', 'mask_structure: "0:0"')
    recipe.write_text(text)
    dense = prune(MODEL_DIR, recipe, tmp_path / "dense", **QUICK)
    recipe.write_text(
        text.replace("steps: 0", "steps: 0\n      storage: sparse-bitmask")
    )
    packed = prune(MODEL_DIR, recipe, tmp_path / "packed", **QUICK)
    formats = {x.name: x.format for x in inspect(packed)}
    stored = [name for name, storage in formats.items() if "sparse-bitmask" in storage]
    assert len(stored) == 8  # q and k of four layers
    assert all(name.endswith(("q_proj", "k_proj")) for name in stored)
    to_dense(packed, tmp_path / "restored")
    assert digests(tmp_path / "restored") == digests(dense)
    if scheme is None:
        AutoModelForCausalLM.from_pretrained(tmp_path / "restored")


def test_a_layer_is_marked_for_its_zeros_wherever_they_lie(tmp_path):
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.ones(2048, 1024).bfloat16()}
    tensors["model.layers.0.mlp.up_proj.weight"][700:] = 0
    mark(write(tmp_path / "model", tensors))
    found = marker.read_unstructured(config_of(tmp_path / "model"))
    assert found == ["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("storage", ["marlin-24", "sparse"])
def test_an_unknown_storage_is_refused(storage, tmp_path):
    recipe = written(tmp_path, storage=storage)
    with pytest.raises(
        ValueError, match="'dense', 'sparse-24-bitmask' or 'sparse-bitmask'"
    ):
        prune(MODEL_DIR, recipe, tmp_path / "out", **QUICK)


def test_modifiers_that_disagree_on_the_storage_are_refused(tmp_path):
    recipe = written(tmp_path, storage="dense")
    recipe.write_text(
        recipe.read_text().replace(
            "SparseGPTModifier:",
            "ALPSPruningModifier:\n      storage: sparse-24-bitmask",
        )
    )
    with pytest.raises(ValueError, match="storages dense and sparse-24-bitmask"):
        prune(MODEL_DIR, recipe, tmp_path / "out", **QUICK)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    with pytest.raises(ValueError, match="storages dense and sparse-24-bitmask"):
        oneshot(model=model, dataset=windows(), recipe=str(recipe))


def test_a_model_that_was_loaded_packed_is_saved_dense_with_a_marker(tmp_path):
    prune_2of4(MODEL_DIR, tmp_path / "dense")
    from llmc_attnmask.checkpoint.convert import to_packed

    to_packed(tmp_path / "dense", tmp_path / "packed")
    recipe = written(tmp_path, rest=False)
    oneshot(
        model=load(tmp_path / "packed"),
        tokenizer=str(MODEL_DIR),
        dataset=windows(),
        recipe=str(recipe),
        output_dir=str(tmp_path / "again"),
    )
    config = config_of(tmp_path / "again")
    assert "quantization_config" not in config
    assert len(marker.read(config)) == 28
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


class TestAnExistingOutput:
    @pytest.fixture
    def previous(self, tmp_path):
        folder = Path(shutil.copytree(MODEL_DIR, tmp_path / "out"))
        (folder / "model-00001-of-00002.safetensors").write_text("stale")
        (folder / "model.safetensors.index.json").write_text("stale")
        (folder / "notes.txt").write_text("mine")
        (folder / "adapter_model.safetensors").write_text("mine")
        return folder

    def content(self, folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def save(self, folder: Path) -> None:
        from llmc_attnmask.upstream.save import save_as

        model = load(prune_2of4(MODEL_DIR, folder.parent / "source"))
        save_as(model, "sparse-24-bitmask")
        model.save_pretrained(folder)

    def test_is_replaced_and_other_files_stay(self, previous):
        self.save(previous)
        names = {path.name for path in previous.iterdir()}
        mine = {"notes.txt", "adapter_model.safetensors", "tokenizer.json"}
        assert mine <= names
        (previous / "adapter_model.safetensors").unlink()  # is not safetensors
        assert not any("index" in n or "00001" in n or n[0] == "." for n in names)
        assert len([x for x in inspect(previous) if x.two_of_four]) == 28
        load(previous)

    @pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
    def test_is_untouched_by_a_save_that_fails(self, previous, monkeypatch, error):
        before = self.content(previous)

        def fail(*_, **__):
            raise error

        monkeypatch.setattr(
            "llmc_attnmask.checkpoint.transfers.sparse_24_bitmask.Pack.write", fail
        )
        with pytest.raises(type(error)):
            self.save(previous)
        assert self.content(previous) == before


def test_pushing_to_the_hub_while_saving_is_refused(tmp_path):
    from llmc_attnmask.upstream.save import save_as

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    save_as(model, "dense")
    with pytest.raises(ValueError, match="push_to_hub would upload"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert list(tmp_path.iterdir()) == []


def test_large_models_are_saved_and_packed_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("llmc_attnmask.upstream.save._MAX_SHARD_SIZE", "1MB")
    recipe = written(tmp_path, None, "sparse-24-bitmask")
    saved = prune(MODEL_DIR, recipe, tmp_path / "out", **QUICK)
    assert len(list(saved.glob("model-*.safetensors"))) > 2
    assert len([x for x in inspect(saved) if "bitmask" in x.format]) == 28
    assert load(saved).model.layers[3].mlp.up_proj.weight.any()
