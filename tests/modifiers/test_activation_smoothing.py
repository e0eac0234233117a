from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.offset_norm import CalibrationOffsetNorm
from loguru import logger
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from llmc_attnmask import ActivationSmoothingModifier, MaskedGPTQModifier
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.modifiers.activation_smoothing import _divide
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.prune import save
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.architectures import FAMILIES, small_model

QKV = {f"self_attn.{p}_proj" for p in "qkv"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
# what is smoothed in the second block
SMOOTHED = {
    "llama": {"input_layernorm", "post_attention_layernorm"} | QKV | MLP,
    # its post_attention_layernorm is not read by the MLP
    "gemma3_text": {"input_layernorm", "pre_feedforward_layernorm"} | QKV | MLP,
    # gate and up are rows of one Linear, so they cannot be scaled alone
    "phi3": {
        *("input_layernorm", "self_attn.qkv_proj"),
        *("post_attention_layernorm", "mlp.gate_up_proj"),
    },
    # with biases, and a ReLU in between
    "opt": {"self_attn_layer_norm", "final_layer_norm", "fc1", "fc2"} | QKV,
    # its experts read tokens that a router has selected, not what the norm returns;
    # their own projections are smoothed, but oneshot has split them
    "qwen3_moe": {"input_layernorm"} | QKV,
    # its norms come after the residual sums, which read them as well
    "bert": set(),
}


def varied(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a small model whose norms and biases are not all the same number."""
    model = small_model(family)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model.float().eval()(tokens).logits


@pytest.mark.parametrize("family", SMOOTHED)
def test_a_smoothed_model_computes_the_same(family, tokenizer, tmp_path):
    dtype = torch.bfloat16 if family == "gemma3_text" else torch.float32
    dense = save(varied(family, dtype), tokenizer, tmp_path / "dense")
    head = getattr(transformers, FAMILIES[family].head)
    before, after = (head.from_pretrained(dense, dtype=dtype) for _ in range(2))
    tokens = torch.randint(5, 2000, (8, 32))
    compress(after, tokenizer, [ActivationSmoothingModifier()], tokens)
    old, new = before.state_dict(), after.state_dict()
    # by more than llm-compressor rounds Gemma's norms
    changed = {
        name.rpartition(".")[0]
        for name in old.keys() & new.keys()
        if (new[name] - old[name]).norm() > 0.02 * old[name].norm()
    }
    block = "layers.1." if family != "bert" else "layer.1."
    found = {n.partition(block)[2] for n in changed if block in n}
    assert found == SMOOTHED[family]
    expected = logits(before, tokens)
    difference = (logits(after, tokens) - expected).norm() / expected.norm()
    assert difference < (1e-2 if dtype == torch.bfloat16 else 1e-5)


SHARED = {
    "an MLP": lambda first, second: setattr(second, "mlp", first.mlp),
    "a weight": lambda first, second: setattr(
        second.mlp.down_proj, "weight", first.mlp.down_proj.weight
    ),
}


@pytest.mark.parametrize("shared", SHARED)
def test_what_several_blocks_share_is_not_scaled(shared, tokenizer, calibration):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    SHARED[shared](*model.model.layers[:2])
    tokens = calibration[:2, :32]
    before = logits(model, tokens)
    compress(model, tokenizer, [ActivationSmoothingModifier()], tokens)
    assert (logits(model, tokens) - before).norm() < 1e-5 * before.norm()


@pytest.mark.parametrize("mean", [-0.6, 0.0, 4.0])
def test_the_gain_that_an_offset_norm_gets_back_is_known_exactly(mean):
    norm = GemmaRMSNorm(64).to(torch.bfloat16)
    norm.weight.data = (mean + 0.2 * torch.randn(64)).to(torch.bfloat16)
    during = CalibrationOffsetNorm(norm, None)
    gain = during.weight.detach().float()
    scales = _divide(during, torch.randn(64).exp())
    after = 1 + during.restore(norm).weight.detach().float()
    torch.testing.assert_close(after * scales, gain, rtol=1e-6, atol=0)


def with_large_channels() -> PreTrainedModel:
    """Return the shipped model at 2:4 and with some large activation channels."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")
    structure = MaskStructure.parse("2:4")
    for name, weight in model.named_parameters():
        if "_proj" in name:
            weight.data.masked_fill_(~structure.mask(weight.abs(), 0.5), 0.0)
    for layer in model.model.layers:
        mlp, attention = layer.mlp, layer.self_attn
        for norm, readers in (
            (layer.input_layernorm, [attention.q_proj, attention.k_proj]),
            (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        ):
            if norm is layer.input_layernorm:
                readers.append(attention.v_proj)
            norm.weight.data[::16] *= 32
            for reader in readers:
                reader.weight.data[:, ::16] /= 32
        mlp.up_proj.weight.data[::16] *= 32
        mlp.down_proj.weight.data[:, ::16] /= 32
    return model


def test_quantized_activations_lose_less_and_masks_stay(
    tokenizer, calibration, evaluation
):
    def divergence(*modifiers) -> float:
        model = with_large_channels()
        masks = {n: w != 0 for n, w in model.named_parameters() if "_proj" in n}
        tokens = evaluation[:8, :64]
        reference = logits(model, tokens).log_softmax(-1)
        model.to(torch.bfloat16)
        quantization = MaskedGPTQModifier(
            scheme="W8A8", targets=["Linear"], ignore=["re:.*lm_head"]
        )
        compress(model, tokenizer, [*modifiers, quantization], calibration[:8, :64])
        for name, kept in masks.items():
            assert not model.get_parameter(name)[~kept].any()
        found = logits(model, tokens).log_softmax(-1)
        return float((reference.exp() * (reference - found)).sum(-1).mean())

    assert divergence(ActivationSmoothingModifier()) < 0.2 * divergence()


def test_smoothing_after_the_quantization_is_refused(tokenizer, calibration):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")
    quantization = MaskedGPTQModifier(scheme="W8A8", targets=["re:.*layers.0.*_proj$"])
    with pytest.raises(ValueError, match=r"after MaskedGPTQModifier .* put it before"):
        compress(
            model,
            tokenizer,
            [quantization, ActivationSmoothingModifier()],
            calibration[:2, :16],
        )


def test_a_pass_shared_with_the_quantization_is_refused(calibration):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")
    quantization = MaskedGPTQModifier(scheme="W8A8", targets=["re:.*layers.0.*_proj$"])
    with pytest.raises(ValueError, match="same pass as MaskedGPTQModifier"):
        oneshot(
            model=model,
            dataset=Dataset.from_dict({"input_ids": calibration[:2, :16].tolist()}),
            recipe=[ActivationSmoothingModifier(), quantization],
            pipeline="sequential",
        )


def test_a_model_without_anything_to_smooth_is_left_alone_with_a_warning(
    tokenizer, tmp_path
):
    dense = save(small_model("gpt2"), tokenizer, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense)
    messages = []
    handler = logger.add(messages.append, level="WARNING")
    try:
        modifier = ActivationSmoothingModifier()
        compress(model, tokenizer, [modifier], torch.randint(5, 2000, (2, 16)))
    finally:
        logger.remove(handler)
    assert any("no activations of GPT2LMHeadModel" in m for m in messages)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_smoothed_checkpoint_is_an_ordinary_one(tokenizer, calibration, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto")
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    compress(model, tokenizer, [ActivationSmoothingModifier()], calibration[:4, :32])
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, before)
    assert not any(m._forward_pre_hooks for m in model.modules())
    saved: Path = save(model, tokenizer, tmp_path / "smoothed")
    reloaded = AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    tokens = calibration[:2, :32]
    assert torch.equal(logits(reloaded, tokens), logits(model, tokens))
