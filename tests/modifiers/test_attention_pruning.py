import re
from pathlib import Path

import pytest
import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.core import State
from llmcompressor.modifiers.quantization import QuantizationModifier
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmc_attnmask import AttentionMatrixPruningModifier
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.recipe import load_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR

RECIPES = Path(__file__).parents[2] / "recipes"
LAYERS = 4


def tiny() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")


@pytest.fixture
def run(tokenizer, calibration):
    def prune(*modifiers, samples: int = 8, model=None) -> dict[str, Tensor]:
        model = tiny() if model is None else model
        compress(model, tokenizer, list(modifiers), calibration[:samples])
        return {k: v.clone() for k, v in model.state_dict().items()}

    return prune


def quick(**fields) -> AttentionMatrixPruningModifier:
    """Make a modifier in light mode, with which one sees what has been pruned."""
    shape = {"sparsity": 0.5, "mask_structure": "2:4", "update_weights": False}
    return AttentionMatrixPruningModifier(**shape | {"steps": 4} | fields)


def pruned_names(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Return the tensors that changed, as `layer.projection`."""
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    return {".".join(re.findall(r"\d+|[a-z]+_proj", name)) for name in changed}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)


def check_light_mode(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Zeros are +0.0; everything else keeps its bits."""
    for name, tensor in after.items():
        kept = tensor != 0
        assert torch.equal(bits(tensor)[kept], bits(before[name])[kept])
        zeros = bits(tensor)[~kept & (before[name] != 0)]
        assert not zeros.any()  # -0.0 has its sign bit set


@pytest.mark.parametrize("structure", ["2:4", "4:8", "1:4"])
def test_n_of_m_holds_for_every_group_of_q_and_k(run, structure):
    before = tiny().state_dict()
    parsed = MaskStructure.parse(structure)
    sparsity = parsed.pruned / parsed.group
    after = run(quick(mask_structure=structure, sparsity=sparsity))
    expected = {f"{i}.{p}_proj" for i in range(LAYERS) for p in "qk"}
    assert pruned_names(before, after) == expected
    check_light_mode(before, after)
    for name, weight in after.items():
        if re.search("[qk]_proj", name):
            zeros = (weight == 0).view(-1, parsed.group).sum(-1)
            assert (zeros >= parsed.pruned).all()


def test_an_unstructured_count_is_exact_and_may_differ_by_layer(run):
    sparsities = [0.1, 0.55, 0.0, 0.9]
    model = tiny()
    for parameter in model.parameters():
        parameter.data[parameter.data == 0] = 1e-3  # every zero is then pruned
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after = run(quick(mask_structure="0:0", sparsity=sparsities), model=model)
    check_light_mode(before, after)
    for i, sparsity in enumerate(sparsities):
        for p in "qk":
            weight = after[f"model.layers.{i}.self_attn.{p}_proj.weight"]
            assert int((weight == 0).sum()) == round(sparsity * weight.numel())


@pytest.mark.parametrize("structure", ["2:4", "0:0"])
def test_accuracy_mode_updates_the_survivors_and_keeps_the_zeros(run, structure):
    before = tiny().state_dict()
    after = run(quick(mask_structure=structure, update_weights=True))
    expected = {f"{i}.{p}_proj" for i in range(LAYERS) for p in "qk"}
    assert pruned_names(before, after) == expected
    for name in after:
        if re.search("[qk]_proj", name):
            kept = after[name] != 0
            assert kept.float().mean() == pytest.approx(0.5, abs=0.01)
            assert (after[name] != before[name])[kept].float().mean() > 0.5
            assert not bits(after[name])[~kept].any()  # no -0.0


@pytest.mark.parametrize("update", [False, True])
def test_all_four_projections_can_be_pruned(run, update):
    before = tiny().state_dict()
    after = run(quick(projections=["q", "k", "v", "o"], update_weights=update))
    expected = {f"{i}.{p}_proj" for i in range(LAYERS) for p in "qkvo"}
    assert pruned_names(before, after) == expected
    for name in after:
        if re.search("[qkvo]_proj", name):
            zeros = after[name] == 0
            assert (zeros.view(-1, 4).sum(-1) >= 2).all()
            assert not bits(after[name])[zeros & (before[name] != 0)].any()
    if not update:
        check_light_mode(before, after)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(run):
    first, second, other = (run(quick(seed=s, steps=12), samples=20) for s in (1, 1, 2))
    assert all(torch.equal(bits(first[n]), bits(second[n])) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_targets_and_ignore_select_modules_and_projections_select_linears(run):
    before = tiny().state_dict()
    after = run(
        quick(
            targets="re:.*layers.[012].self_attn$",
            ignore=["re:.*layers.1.*"],
            projections=["q"],
        )
    )
    assert pruned_names(before, after) == {"0.q_proj", "2.q_proj"}
    after = run(quick(targets=["LlamaAttention"], projections=["k"]))
    assert pruned_names(before, after) == {f"{i}.k_proj" for i in range(LAYERS)}


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
def test_it_runs_in_every_pipeline_from_the_stock_entry_point(
    pipeline, tokenizer, calibration, tmp_path
):
    from datasets import Dataset

    dataset = Dataset.from_dict({"input_ids": calibration[:4].tolist()})
    model = oneshot(
        model=str(MODEL_DIR),
        dataset=dataset,
        recipe=str(RECIPES / "attention_2of4.yaml"),
        pipeline=pipeline,
        num_calibration_samples=4,
        max_seq_length=64,
        output_dir=str(tmp_path / "out"),
    )
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = model.state_dict()
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, expected[name])
    weight = reloaded.model.layers[2].self_attn.q_proj.weight
    assert ((weight == 0).view(-1, 4).sum(-1) == 2).all()
    saved_recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "AttentionMatrixPruningModifier" in saved_recipe
    assert not hasattr(reloaded.config, "quantization_config")


def test_masks_survive_round_to_nearest_quantization(run):
    model = tiny()
    run(
        quick(),
        QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=["lm_head"]),
        model=model,
    )
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert ((weight == 0).view(-1, 4).sum(-1) >= 2).all()


def test_only_the_rows_of_q_and_k_are_pruned_in_a_fused_qkv(run, tmp_path):
    from tests.support.architectures import SMALL

    config = transformers.Phi3Config(
        **SMALL | {"vocab_size": 2048, "original_max_position_embeddings": 4096}
    )
    transformers.Phi3ForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after = run(quick(), model=model)
    check_light_mode(before, after)
    for i in range(2):
        weight = after[f"model.layers.{i}.self_attn.qkv_proj.weight"]
        zeros = (weight == 0).view(weight.shape[0], -1, 4).sum(-1)
        assert (zeros[:48] == 2).all()  # 4 heads of q and 2 of k, 8 rows each
        assert (zeros[48:] == 0).all()  # v


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsty": 0.5}, "sparsty\n.*Extra inputs are not permitted"),
        ({"mask_structure": "2by4"}, 'expected "N:M"'),
        ({"sparsity": 1.0, "mask_structure": "0:0"}, r"expected a number in \[0, 1\)"),
        ({"sparsity": [0.5, 0.7]}, 'sparsity 0.7 contradicts mask_structure "2:4"'),
        ({"projections": []}, "expected some of q, k, v, o, each once"),
        ({"projections": ["q", "q"]}, "expected some of q, k, v, o, each once"),
        ({"projections": ["q", "up"]}, "should be 'q', 'k', 'v' or 'o'"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"mask_structure": 124}, 'write it in quotes, "N:M"'),
        ({"output_weight": 1.5}, "less than or equal to 1"),
    ],
)
def test_invalid_fields_are_refused_at_construction(fields, message):
    with pytest.raises(ValidationError, match=message):
        quick(**fields)


def test_targets_that_match_nothing_list_the_attention_modules():
    message = (
        r"'re:\.\*q_proj\$' matches no .* the model has model\.layers\.0\.self_attn,"
    )
    with pytest.raises(ValueError, match=message):
        quick(targets=["LlamaAttention", "re:.*q_proj$"]).initialize(
            State(model=tiny())
        )
    with pytest.raises(ValueError, match="leaves no attention module"):
        quick(ignore=["LlamaAttention"]).initialize(State(model=tiny()))


def test_a_sparsity_list_of_the_wrong_length_is_refused():
    modifier = quick(sparsity=[0.5] * 3)
    with pytest.raises(ValueError, match="lists 3 values for 4 attention modules"):
        modifier.initialize(State(model=tiny()))


def test_indivisible_in_features_are_refused():
    with pytest.raises(ValueError, match=r"q_proj: 192 in-features are not divisible"):
        quick(mask_structure="2:5", sparsity=0.4).initialize(State(model=tiny()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["self_attn.k_proj", "mlp.up_proj"])
def test_weights_that_are_not_finite_are_refused_wherever_they_are(value, place):
    model = tiny()
    model.model.layers[1].get_submodule(place).weight.data[3, 5] = value
    with pytest.raises(ValueError, match=rf"layers\.1\.{place}.* has 1 NaN"):
        quick().initialize(State(model=model))


def test_scales_that_are_not_yet_calibrated_may_have_any_value():
    model = tiny()
    quantization = QuantizationModifier(scheme="W8A8", targets=["Linear"])
    quantization.initialize(State(model=model))
    model.model.layers[0].mlp.up_proj.weight_scale.data.fill_(float("nan"))
    quick().initialize(State(model=model))


def test_a_layer_whose_output_is_zero_is_still_pruned(run):
    model = tiny()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    after = run(quick(), model=model)
    weight = after["model.layers.1.self_attn.q_proj.weight"]
    assert ((weight == 0).view(-1, 4).sum(-1) == 2).all()


def test_a_run_that_fails_leaves_no_hook_on_the_model(run, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no room")

    model = tiny()
    module = "llmc_attnmask.modifiers.attention_pruning.learn_masks"
    monkeypatch.setattr(module, fail)
    with pytest.raises(MemoryError):
        run(quick(), model=model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_two_modifiers_can_share_the_projections(run):
    before = tiny().state_dict()
    after = run(
        quick(projections=["q"]),
        quick(projections=["k"], mask_structure="0:0", sparsity=0.3),
    )
    expected = {f"{i}.{p}_proj" for i in range(LAYERS) for p in "qk"}
    assert pruned_names(before, after) == expected
    check_light_mode(before, after)


def test_a_model_without_the_attention_interface_is_refused():
    config = transformers.GPTJConfig(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4
    )
    model = transformers.GPTJForCausalLM(config)
    with pytest.raises(ValueError, match=r"GPTJAttention computes its softmax itself"):
        quick().initialize(State(model=model))


def test_every_shipped_recipe_loads():
    recipes = sorted(RECIPES.glob("*.yaml"))
    assert len(recipes) >= 3
    for recipe in recipes:
        assert load_recipe(recipe).modifiers
