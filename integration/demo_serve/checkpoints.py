"""Write checkpoints of Llama-3.2-1B's shape with random weights.

Speed does not depend on the values of weights, only on which of them are zeros.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmc_attnmask.checkpoint.config import PackedStorage
from llmc_attnmask.checkpoint.convert import to_packed
from llmc_attnmask.checkpoint.store import mark

LAYERS, HIDDEN, INTERMEDIATE, KEYS, VOCABULARY = 16, 2048, 8192, 512, 128256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
STORAGES: dict[str, PackedStorage | None] = {
    "dense": None,
    "2:4": "sparse-24-bitmask",
    "60 %": "sparse-bitmask",
}
# W8A8 with a scale for each channel and token, and W4A16 with one for each 128 inputs
TYPES = {"bf16": list(STORAGES), "int8": list(STORAGES), "int4": ["dense"]}
GROUP = 128


def make(folder: Path, weights: str, dtype: str) -> Path:
    """Write a checkpoint, unless it is there.

    :param weights: one of ``STORAGES``, which also says how they are stored
    :param dtype: one of ``TYPES``
    :return: its folder, within ``folder``
    """
    name = f"{weights.replace(':', 'of').replace(' %', '')}-{dtype}"
    target = folder / name
    if (target / "config.json").exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    dense = folder / f".{name}"
    shutil.rmtree(dense, ignore_errors=True)
    dense.mkdir()
    save_file(_tensors(weights, dtype), dense / "model.safetensors", {"format": "pt"})
    config = dict(CONFIG)
    if dtype != "bf16":
        config["quantization_config"] = _quantization(dtype)
    (dense / "config.json").write_text(json.dumps(config))
    storage = STORAGES[weights]
    if storage is None:
        return dense.rename(target)
    mark(dense)
    to_packed(dense, target, storage=storage)
    shutil.rmtree(dense)
    return target


def _tensors(weights: str, dtype: str) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": _normal(VOCABULARY, HIDDEN, random).bfloat16(),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        for name, shape in SHAPES.items():
            weight = _pruned(_normal(*shape, random), weights)
            stored = _stored(weight, dtype).items()
            tensors |= {f"{prefix}.{name}.{kind}": tensor for kind, tensor in stored}
    return tensors


def _normal(rows: int, columns: int, random: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=random).mul_(0.02)


def _pruned(weight: Tensor, weights: str) -> Tensor:
    """Prune by magnitude: exactly two of every four, or a share of all entries."""
    if weights == "dense":
        return weight
    if weights == "2:4":
        groups = weight.view(-1, 4)
        smallest = groups.abs().argsort(1)[:, :2]
        return groups.scatter(1, smallest, 0.0).view_as(weight)
    share = float(weights.removesuffix(" %")) / 100
    sample = weight.flatten()[: 1 << 20].abs()
    return weight.masked_fill(weight.abs() < sample.quantile(share), 0.0)


def _stored(weight: Tensor, dtype: str) -> dict[str, Tensor]:
    """Return the tensors of a weight, rounded to the nearest."""
    if dtype == "bf16":
        return {"weight": weight.bfloat16()}
    if dtype == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        rounded = (weight / scale).round().to(torch.int8)
        return {"weight": rounded, "weight_scale": scale}
    groups = weight.view(len(weight), -1, GROUP)
    scale = groups.abs().amax(2) / 7
    unsigned = (groups / scale.unsqueeze(2)).round().int().view(len(weight), -1, 8) + 8
    return {
        "weight_packed": (unsigned << 4 * torch.arange(8)).sum(2).to(torch.int32),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


def _quantization(dtype: str) -> dict[str, Any]:
    """Return the quantization_config, as llm-compressor writes it."""
    integers: dict[str, Any] = {"type": "int", "symmetric": True}
    if dtype == "int8":
        group = {
            "weights": {"num_bits": 8, "strategy": "channel", **integers},
            "input_activations": {
                **{"num_bits": 8, "strategy": "token", "dynamic": True},
                **integers,
            },
        }
    else:
        weights = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
        group = {"weights": weights | integers}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if dtype == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
    }
