"""Measure the quick recipe's time and memory at Llama-3.1-8B's layer shapes.

Random weights and tokens suffice for both. Layers are pruned one after another, so that
32 of them take 32 times as long as one. The recipe's log lines are recorded as they
come.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from integration.gpu.context import Context
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.recipe import load_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR

RECIPE = Path(__file__).parents[3] / "recipes" / "block_2of4_quick.yaml"
LOGGED = 200  # lines at most


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--recipe", type=Path, default=RECIPE)


def random_llama(layers: int, length: int, width: int, device: str) -> LlamaForCausalLM:
    """Make a bf16 model in CPU memory; at width 4096, it has Llama-3.1-8B's shapes."""
    heads = width // 128
    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=128,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):  # a GPU draws random numbers faster
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return model.to("cpu")


def run(context: Context, options: argparse.Namespace) -> None:
    case: dict[str, Any] = {
        "recipe": options.recipe.stem,
        "layers": options.layers,
        "samples": options.samples,
        "length": options.length,
        "width": options.width,
    }
    context.attempt(case, lambda: pruned(context, options))


def pruned(context: Context, options: argparse.Namespace) -> dict[str, Any]:
    """Run a whole recipe; returns seconds and peak memory."""
    model = random_llama(options.layers, options.length, options.width, context.device)
    tokens = torch.randint(model.config.vocab_size, (options.samples, options.length))
    # oneshot needs the paths of the model and its tokenizer
    model.config.name_or_path = str(MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    cuda = context.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    lines = 0

    def log(message: Any) -> None:
        nonlocal lines
        lines += 1
        if lines <= LOGGED:
            context.record(
                after_seconds=time.monotonic() - start, log=message.record["message"]
            )

    sink = logger.add(log, level="METRIC")
    try:
        compress(model, tokenizer, load_recipe(options.recipe).modifiers, tokens)
    finally:
        logger.remove(sink)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.monotonic() - start
    return {
        "tokens": tokens.numel(),
        "seconds": seconds,
        "seconds_per_layer": seconds / options.layers,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }
