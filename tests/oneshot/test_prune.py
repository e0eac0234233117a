import json
from pathlib import Path

import pytest
import torch
from loguru import logger
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc_attnmask import AttentionMatrixPruningModifier
from llmc_attnmask.checkpoint.inspect import inspect
from llmc_attnmask.checkpoint.io.atomic import PROGRESS
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.oneshot.prune import prune
from llmc_attnmask.oneshot.shipped import MODEL_DIR

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = {"num_samples": 8, "max_length": 64}


@pytest.mark.parametrize(
    ("recipe", "pruned", "structured"),
    [
        ("attention_2of4", "qk", True),
        ("attention_2of4_light", "qk", True),
        ("attention_unstructured_50", "qk", False),
        ("block_2of4_quick", "qkvogud", True),
        ("block_2of4", "qkvogud", True),
    ],
)
def test_each_recipe_gives_a_checkpoint_that_plain_transformers_loads(
    recipe, pruned, structured, tmp_path
):
    saved = prune(MODEL_DIR, RECIPES / f"{recipe}.yaml", tmp_path / "out", **QUICK)
    assert saved == tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    assert AutoTokenizer.from_pretrained(saved).bos_token_id is not None
    linears = ("q", "k", "v", "o", "gate", "up", "down")
    for name, weight in model.named_parameters():
        projection = name.split(".")[-2].removesuffix("_proj")
        if projection not in linears:
            continue
        zero = weight == 0
        if projection[0] in pruned:
            assert zero.float().mean() == pytest.approx(0.5, abs=1e-3)
            groups = zero.view(-1, 4).sum(-1)
            assert (groups >= 2).all() == structured
        else:
            assert zero.float().mean() < 0.01
    assert "recipe.yaml" in {path.name for path in saved.iterdir()}


@pytest.mark.parametrize(
    "recipe", ["block_2of4_w8a8_int8", "block_2of4_fp8", "block_2of4_w4a16_gptq"]
)
def test_each_quantizing_recipe_gives_a_2of4_checkpoint_that_transformers_loads(
    recipe, tmp_path
):
    saved = prune(MODEL_DIR, RECIPES / f"{recipe}.yaml", tmp_path / "out", **QUICK)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    assert model.config.quantization_config.quant_method == "compressed-tensors"
    ids = torch.arange(100, 132)[None]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss  # some weights are unpacked on first use
        dense = AutoModelForCausalLM.from_pretrained(MODEL_DIR)(ids, labels=ids).loss
    assert loss == pytest.approx(float(dense), rel=0.2)
    names = [n for n, _ in model.named_parameters() if n.endswith("_proj.weight")]
    assert len(names) == 28
    for name in names:
        weight = model.get_parameter(name).float()
        assert ((weight == 0).view(-1, 4).sum(-1) >= 2).all()
        assert (weight != 0).float().mean() > 0.35  # survivors may round to zero


def test_the_same_seed_gives_byte_identical_safetensors(tmp_path):
    recipe = RECIPES / "block_2of4_quick.yaml"
    first, second = (
        prune(MODEL_DIR, recipe, tmp_path / name, **QUICK) / "model.safetensors"
        for name in "ab"
    )
    assert first.read_bytes() == second.read_bytes()
    dense = load_file(MODEL_DIR / "model.safetensors")
    assert set(load_file(first)) == set(dense)


@pytest.mark.parametrize("storage", ["dense", "sparse-24-bitmask"])
def test_a_quantized_checkpoint_is_dequantized_first_as_by_oneshot(storage, tmp_path):
    few = {"num_samples": 2, "max_length": 32}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "s_stage: {s_modifiers: {SparseGPTModifier: {sparsity: 0.5, "
        "mask_structure: '2:4', targets: ['re:.*_proj$']}, QuantizationModifier: "
        "{scheme: FP8_DYNAMIC, targets: ['re:.*_proj$']}}}"
    )
    first = prune(MODEL_DIR, recipe, tmp_path / "first", **few, storage=storage)
    recipe.write_text(
        "q_stage: {q_modifiers: {MaskedGPTQModifier: "
        "{scheme: W8A8, targets: ['re:.*_proj$']}}}"
    )
    again = prune(first, recipe, tmp_path / "again", **few)
    layers = [x for x in inspect(again) if x.format == "int8"]
    assert len(layers) == 28 and all(x.two_of_four for x in layers)
    ids = torch.arange(20, 52)[None]
    before, after = (load(folder)(ids).logits.float() for folder in (first, again))
    assert (before - after).norm() < 0.1 * before.norm()


@pytest.fixture
def nothing_written(tmp_path):
    """Check that the test leaves the output folder and its siblings as they were."""
    before = sorted(tmp_path.iterdir())
    yield
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_folder_that_is_not_empty_is_left_alone(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        prune(MODEL_DIR, RECIPES / "attention_2of4.yaml", output, **QUICK)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "none.yaml"}, "does not exist"),
        ({"dataset": "./none.jsonl"}, "does not exist"),
        ({"max_length": 5000}, "between 2 and 1024"),
        ({"num_samples": 0}, "expected at least 1"),
        ({"model": "/nonexistent/model"}, "/nonexistent/model"),
        ({"dataset": "SHORT"}, "fewer than one window"),
        ({"recipe": "DROPPED"}, "silently drop"),
        ({"recipe": "INDIVISIBLE"}, "not divisible by 5"),
        ({"recipe": "NO_TARGET"}, "matches no attention module"),
        ({"output": "FILE/out"}, "cannot be created"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    changes, message, tmp_path_factory, tmp_path, nothing_written
):
    inputs = tmp_path_factory.mktemp("inputs")
    fields = "{sparsity: 0.4, mask_structure: '2:5'}"
    contents = {
        "SHORT": "one sentence",
        "DROPPED": "modifiers: {AttentionMatrixPruningModifier: {sparsity: 0.5}}",
        "INDIVISIBLE": f"s_stage: {{m_modifiers: {{AttentionMatrixPruningModifier: "
        f"{fields}}}}}",
        "NO_TARGET": "s_stage: {m_modifiers: {AttentionMatrixPruningModifier: "
        "{sparsity: 0.5, targets: [nothing]}}}",
        "FILE": "",
    }
    for name, content in contents.items():
        (inputs / name).write_text(content)
    changes = {
        key: inputs / value if str(value).split("/")[0] in contents else value
        for key, value in changes.items()
    }
    arguments = {
        "model": MODEL_DIR,
        "recipe": RECIPES / "attention_2of4.yaml",
        "output": tmp_path / "out",
        **QUICK,
        **changes,
    }
    with pytest.raises((ValueError, OSError), match=message):
        prune(**arguments)


def test_the_seed_reaches_a_modifier_whose_recipe_sets_none(tmp_path):
    more = {**QUICK, "num_samples": 20}
    recipe = tmp_path / "quick.yaml"
    recipe.write_text(
        "s_stage: {m_modifiers: {AttentionMatrixPruningModifier: "
        "{sparsity: 0.5, mask_structure: '2:4', steps: 12}}}"
    )
    first, second = (
        prune(MODEL_DIR, recipe, tmp_path / str(seed), seed=seed, **more)
        for seed in (1, 2)
    )
    name = "model.safetensors"
    assert (first / name).read_bytes() != (second / name).read_bytes()


def test_a_failure_while_saving_leaves_only_the_progress(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        prune(MODEL_DIR, RECIPES / "attention_2of4.yaml", tmp_path / "out", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PROGRESS]


def test_warnings_of_the_run_are_in_its_report(tmp_path, monkeypatch):
    start = AttentionMatrixPruningModifier.on_calibration_start

    def warning(self, *args, **kwargs):
        logger.warning("something is odd")
        start(self, *args, **kwargs)

    monkeypatch.setattr(AttentionMatrixPruningModifier, "on_calibration_start", warning)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "a_stage:\n  b_modifiers:\n"
        "    AttentionMatrixPruningModifier: {sparsity: 0.5, steps: 0}\n"
    )
    output = prune(MODEL_DIR, recipe, tmp_path / "out", num_samples=2, max_length=32)
    report = json.loads((output / "report.json").read_text())
    assert "something is odd" in report["warnings"]
