"""Make a random 2:4 checkpoint of Llama-3.1-8B's shape, in memory if there is room.

It is stored dense with the marker in config.json: served without the plugin, it is the
dense model. With fewer layers the vocabulary shrinks in proportion, so that the layers
keep their share of the bytes that a token reads.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from integration.gpu import record
from integration.gpu.context import Context
from integration.gpu.weights import random_weight
from llmc_attnmask.checkpoint import marker

FOLDERS = (Path("/dev/shm"), Path("/tmp"))
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=["bf16", "fp8", "int8"], default="bf16")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="by default, where there is room")


def configuration(layers: int, trial: bool) -> dict[str, Any]:
    """Make the content of config.json for this many layers."""
    whole: dict[str, Any] = LLAMA_8B | (TINY if trial else {})
    vocabulary = whole["vocab_size"] * layers // LLAMA_8B["num_hidden_layers"]
    return whole | {
        "num_hidden_layers": layers,
        "vocab_size": max(256, -(-vocabulary // 64) * 64),
    }


def quantization(dtype: str) -> dict[str, Any] | None:
    """Describe W8A8 as compressed-tensors does, with tokens quantized while serving."""
    if dtype == "bf16":
        return None
    kind = {"num_bits": 8, "type": "float" if dtype == "fp8" else "int"}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if dtype == "fp8" else "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": kind | {"strategy": "channel", "symmetric": True},
                "input_activations": kind
                | {"strategy": "token", "symmetric": True, "dynamic": True},
            }
        },
    }


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the rows and columns of the linear layers of one decoder layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    key_values = config["num_key_value_heads"] * config["head_dim"]
    return {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (key_values, hidden),
        "self_attn.v_proj": (key_values, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def quantized(weight: Tensor, dtype: str) -> dict[str, Tensor]:
    """Return the tensors of one linear layer, by suffix."""
    if dtype == "bf16":
        return {"weight": weight}
    largest = 448.0 if dtype == "fp8" else 127.0
    scale = weight.float().abs().amax(dim=1, keepdim=True) / largest
    scaled = weight.float() / scale
    rounded = (
        scaled.to(torch.float8_e4m3fn)
        if dtype == "fp8"
        else scaled.round().to(torch.int8)
    )
    return {"weight": rounded, "weight_scale": scale.bfloat16()}


def shards(
    config: dict[str, Any], dtype: str, device: str
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the checkpoint's files, on the CPU.

    All decoder layers have the same weights, which does not change what they cost.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    table: Any = {"device": device, "dtype": torch.bfloat16}
    ends = {
        "model.embed_tokens.weight": torch.randn(vocabulary, hidden, **table),
        "lm_head.weight": torch.randn(vocabulary, hidden, **table) / hidden**0.5,
        "model.norm.weight": torch.ones(hidden, **table),
    }
    yield "model-ends.safetensors", {name: t.cpu() for name, t in ends.items()}
    one = {
        f"{norm}.weight": torch.ones(hidden, dtype=torch.bfloat16)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    for name, (rows, columns) in linears(config).items():
        weight = random_weight(rows, columns, torch.bfloat16, device).dense
        # scaled so that activations stay in range layer after layer
        parts = quantized(weight * (2 / columns) ** 0.5, dtype)
        one |= {f"{name}.{part}": parts[part].cpu().contiguous() for part in parts}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield (
            f"model-layer-{layer:02}.safetensors",
            {f"{prefix}.{name}": tensor for name, tensor in one.items()},
        )


def make(folder: Path, config: dict[str, Any], dtype: str, device: str) -> int:
    """Write the checkpoint; returns its bytes."""
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    total = 0
    for file, tensors in shards(config, dtype, device):
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    described = dict(config)
    if (how := quantization(dtype)) is not None:
        described["quantization_config"] = how
    marker.write(
        described,
        [
            f"model.layers.{layer}.{name}"
            for layer in range(config["num_hidden_layers"])
            for name in linears(config)
        ],
    )
    (folder / "config.json").write_text(json.dumps(described, indent=2))
    return total


def folder_with_room(needed: int) -> Path:
    """Return the first folder with this many bytes free.

    :raises OSError: if there is none
    """
    free = {folder: shutil.disk_usage(folder).free for folder in FOLDERS}
    for folder, available in free.items():
        if available > needed * 1.1:
            return folder
    raise OSError(f"no room for {needed / 1e9:.1f} GB; free bytes: {free}")


def run(context: Context, options: argparse.Namespace) -> None:
    case: dict[str, Any] = {"dtype": options.dtype, "layers": options.layers}
    config = configuration(options.layers, context.trial)
    per_layer = sum(rows * columns for rows, columns in linears(config).values())
    entries = config["num_hidden_layers"] * per_layer
    entries += 2 * config["vocab_size"] * config["hidden_size"]

    def work() -> dict[str, Any]:
        name = f"llmc-attnmask-{options.dtype}-{options.layers}"
        folder = (options.folder or folder_with_room(2 * entries)) / name
        if folder.exists():  # from an earlier call, perhaps incomplete
            shutil.rmtree(folder)
        start = time.monotonic()
        size = make(folder, config, options.dtype, context.device)
        return {
            "folder": str(folder),
            "gb": size / 1e9,
            "seconds": time.monotonic() - start,
        }

    context.attempt(case, work)


def made(rows: list[record.Row], dtype: str, layers: int) -> Path:
    """Return the folder of the checkpoint that an earlier step made.

    :raises RuntimeError: if there is none
    """
    case = {"step": "checkpoint", "dtype": dtype, "layers": layers}
    for row in reversed(rows):
        if case.items() <= row.items() and "folder" in row:
            return Path(row["folder"])
    raise RuntimeError(
        f"no {dtype} checkpoint of {layers} layers was made; run the step checkpoint "
        f"with --dtype {dtype} --layers {layers} first"
    )
