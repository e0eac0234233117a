"""A tiny random model of every architecture that the modifiers support.

    python -m tests.support.architectures > docs/architectures.md

measures what ``tests/test_architectures.py`` checks and writes the document.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from llmc_attnmask.attention.capture import AttentionReplica
from llmc_attnmask.attention.projections import attention_modules, find_projections
from llmc_attnmask.evaluation.attention_error import attention_errors, attention_inputs
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.modifiers import AttentionMatrixPruningModifier
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.prune import save
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.attention import probabilities

TWO_OF_FOUR = MaskStructure.parse("2:4")
SMALL: dict[str, Any] = {
    "vocab_size": 2048,  # the shipped tokenizer's
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 32,
}
_ROTARY_3D = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Family:
    """A family of models; ``fields`` go into its config in addition to ``SMALL``."""

    feature: str
    fields: dict[str, Any] = field(default_factory=dict)
    head: str = "AutoModelForCausalLM"


_TEXT_AND_IMAGE = "AutoModelForImageTextToText"
FAMILIES = {
    "llama": Family("grouped heads"),
    "qwen2": Family("biases"),
    "qwen3": Family("q and k norms"),
    "mistral": Family("sliding window", {"sliding_window": 5}),
    "gemma2": Family(
        "soft cap, own scale", {"sliding_window": 5, "query_pre_attn_scalar": 12}
    ),
    "gemma3_text": Family(
        "windows that differ from layer to layer",
        {"sliding_window": 5, "query_pre_attn_scalar": 8},
    ),
    "phi3": Family(
        "q, k and v in one Linear", {"original_max_position_embeddings": 64}
    ),
    "gpt_oss": Family(
        "sinks, experts", {"num_local_experts": 2, "num_experts_per_tok": 1}
    ),
    "qwen3_moe": Family(
        "experts",
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    ),
    "glm": Family("partial rotary embedding"),
    "stablelm": Family("partial rotary embedding"),
    "deepseek_v3": Family(
        "multi-head latent attention, experts",
        {
            "q_lora_rank": 12,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 4,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt2": Family("Conv1D, q, k and v in one"),
    "gpt_bigcode": Family("q, k and v in one, head by head", {"multi_query": False}),
    "gpt_neox": Family("q, k and v in one, head by head"),
    "opt": Family("learned positions", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    "bert": Family("bidirectional, o elsewhere", head="AutoModelForMaskedLM"),
    "modernbert": Family(
        "bidirectional, windows, q, k and v in one Linear",
        {"cls_token_id": 3, "sep_token_id": 4, "local_attention": 8},
        head="AutoModelForMaskedLM",
    ),
    "qwen2_5_vl": Family("text tower of a vision model", head=_TEXT_AND_IMAGE),
    "qwen3_vl": Family("text tower of a vision model", head=_TEXT_AND_IMAGE),
}
REFUSED = {  # by the attention modifier
    "qwen3_next": Family(
        "a gate within q_proj",
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["full_attention", "full_attention"],
        },
    ),
}


def small_model(family: str) -> PreTrainedModel:
    """Make two eager float32 layers with uneven attention and some large features."""
    torch.manual_seed(0)
    known = (FAMILIES | REFUSED)[family]
    fields = SMALL | known.fields
    if known.head == _TEXT_AND_IMAGE:
        text = fields | {"rope_parameters": _ROTARY_3D}
        fields = {"text_config": text, "vision_config": _VISION}
    config = AutoConfig.for_model(family, **fields)
    config._attn_implementation = "eager"
    head = getattr(transformers, known.head)
    model = head.from_config(config, dtype=torch.float32).eval()
    model.get_input_embeddings().weight.data[:, ::8] *= 4  # as in trained models
    for module in text_attention(model).values():
        for name, parameter in module.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def text_attention(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    found = attention_modules(model)
    return {name: m for name, m in found.items() if "visual" not in name}


def deviation_from_eager(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return the largest difference between recomputed and own attention matrices."""
    with torch.no_grad():
        expected = model(tokens, output_attentions=True, use_cache=False).attentions
    inputs = {n: i for n, i in attention_inputs(model, tokens).items() if len(i)}
    assert len(inputs) == len(expected) == SMALL["num_hidden_layers"]
    largest = 0.0
    for (name, collected), own in zip(inputs.items(), expected, strict=True):
        assert own.std() > 0.01  # not the uniform matrix that anything would give
        replica = AttentionReplica(model.get_submodule(name))
        everything = collected.batch(
            range(len(collected)), replica.device, replica.dtype
        )
        found = probabilities(replica(*everything))
        largest = max(largest, float((found - own).abs().max()))
    return largest


@torch.no_grad()
def magnitude(model: PreTrainedModel) -> None:
    for module in text_attention(model).values():
        projections = find_projections(module)
        for role in ("q", "k"):
            weight = module.get_parameter(projections[role].parameter)
            values = projections[role].of(weight)
            kept = TWO_OF_FOUR.mask(values.abs(), 0.5)
            projections[role].put(weight, values.masked_fill(~kept, 0.0))


@dataclass(frozen=True)
class Outcome:
    """What one family gives, from oneshot to a reloaded checkpoint."""

    layout: str  # which Linears hold q and k
    deviation: float  # of the recomputed attention from the model's own
    error: float  # relative attention error, mean over layers
    magnitude_error: float
    misplaced: int  # groups of q and k that are not 2:4, and other entries that changed
    # of the reloaded checkpoint's logits from those of the model in memory, whose
    # experts oneshot computes one by one
    reloaded_deviation: float


def measure(family: str) -> Outcome:
    model = small_model(family)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokens = torch.randint(5, 2000, (16, 32))
    deviation = deviation_from_eager(model, tokens)
    head = getattr(transformers, FAMILIES[family].head)
    with tempfile.TemporaryDirectory() as folder:
        dense = save(model, tokenizer, Path(folder) / "dense")
        models = [
            head.from_pretrained(dense, attn_implementation="eager") for _ in range(2)
        ]
        magnitude(models[0])
        by_magnitude = _mean_error(model, models[0], tokens)
        modifier = AttentionMatrixPruningModifier(
            sparsity=0.5,
            mask_structure="2:4",
            update_weights=False,
            output_weight=0,
            steps=60,
            ignore=["re:.*visual.*"],
        )
        compress(models[1], tokenizer, [modifier], tokens)
        with torch.no_grad():
            before = models[1](tokens).logits
        error = _mean_error(model, models[1], tokens)
        pruned = save(models[1], tokenizer, Path(folder) / "pruned")
        reloaded = head.from_pretrained(pruned, attn_implementation="eager")
        with torch.no_grad():
            after = reloaded(tokens).logits
    return Outcome(
        _layout(model),
        deviation,
        error,
        by_magnitude,
        _misplaced(model, reloaded),
        (before - after).abs().max().item(),
    )


def _mean_error(
    dense: PreTrainedModel, pruned: PreTrainedModel, tokens: Tensor
) -> float:
    errors = attention_errors(dense, pruned, tokens)
    return sum(errors.values()) / len(errors)


def _layout(model: PreTrainedModel) -> str:
    projections = find_projections(next(iter(text_attention(model).values())))
    return ", ".join(
        f"{role}: {p.child}" if p.whole else f"{role}: rows of {p.child}"
        for role, p in projections.items()
        if role in ("q", "k")
    )


def _misplaced(dense: PreTrainedModel, pruned: PreTrainedModel) -> int:
    """Count what violates light mode: q and k are 2:4, and nothing else has changed."""
    before, after = dense.state_dict(), pruned.state_dict()
    wrong = 0
    for name, module in text_attention(dense).items():
        projections = find_projections(module)
        for role in ("q", "k"):
            key = f"{name}.{projections[role].parameter}"
            weight = projections[role].of(after[key])
            zeros = (weight == 0).reshape(-1, 4).sum(-1)
            wrong += int((zeros != 2).sum()) + int(
                torch.signbit(weight[weight == 0]).sum()
            )
            restored = after[key].clone()
            kept = torch.where(weight == 0, projections[role].of(before[key]), weight)
            projections[role].put(restored, kept)
            after[key] = restored
    return wrong + sum(int((before[n] != after[n]).sum()) for n in before)


HEADER = """# Architectures

These are tiny random models (2 layers, hidden size 32, 4 heads) in float32. q and k
were pruned to 2:4 in light mode by `oneshot`, saved and reloaded. The table is written
by `python -m tests.support.architectures`; the test suite checks every row.

"Recomputed" is the largest difference between the recomputed attention matrix and the
one that the model's own eager attention returns. Errors are relative, averaged over
layers.

| model type | particular | pruned | recomputed | attention error | magnitude's |
|---|---|---|--:|--:|--:|"""
FOOTER = """
T5 (a layout of its own, `q k v o`), GPT-J and others that compute their softmax
themselves, and Qwen3-Next (a gate within `q_proj`) are refused by name. Put
cross-attention and vision towers under `ignore`: calibration text does not reach them,
and the run says so."""


def row(family: str, found: Outcome) -> str:
    return (
        f"| `{family}` | {FAMILIES[family].feature} | {found.layout} "
        f"| {found.deviation:.0e} | {found.error:.5f} | {found.magnitude_error:.5f} |"
    )


if __name__ == "__main__":
    print("\n".join([HEADER, *(row(f, measure(f)) for f in FAMILIES), FOOTER]))
