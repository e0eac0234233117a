"""Time and memory of pruning a model with Llama-3.1-8B's shapes on one GPU.

    python integration/gpu/pruning.py [--layers 32] [--samples 128] [--length 2048]

First the fused kernels of the attention error against float64 and against the plain
version; then the whole block to 2:4 (``recipes/block_2of4_recovered.yaml``) on random
weights, which suffice for time and memory. Prints JSON; without a GPU it says so and
measures nothing.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmc_attnmask.attention import matrix
from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.matrix import attention_error
from llmc_attnmask.builtin import MODEL_DIR
from llmc_attnmask.pruning import compress
from llmc_attnmask.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "block_2of4_recovered.yaml"


def random_call(
    length: int, dtype: torch.dtype, device: str
) -> tuple[AttentionCall, Tensor, Tensor, Tensor]:
    """Llama-3.1-8B's heads: 32 on 8 of 128; dense call, pruned q and k, W_o."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    mask = torch.zeros(1, 1, length, length, dtype=dtype, device=device)
    mask.masked_fill_(hidden, torch.finfo(torch.float32).min)
    query, key = normal(1, 32, length, 128), normal(1, 8, length, 128)
    call = AttentionCall(query, key, normal(1, 8, length, 128), mask, 128**-0.5)
    projection = normal(4096, 4096) / 64
    return (
        call,
        query + 0.1 * normal(*query.shape),
        key + 0.1 * normal(*key.shape),
        projection,
    )


def error_and_gradients(
    call: AttentionCall, query: Tensor, key: Tensor, projection: Tensor
) -> list[Tensor]:
    pruned = [x.detach().requires_grad_() for x in (query, key)]
    error = attention_error(
        call, *pruned, output_weight=0.9, output_projection=projection
    )
    return [error.detach(), *torch.autograd.grad(error, pruned)]


def in_dtype(call: AttentionCall, dtype: torch.dtype) -> AttentionCall:
    mask = None if call.mask is None else call.mask.to(dtype)
    return AttentionCall(
        call.query.to(dtype),
        call.key.to(dtype),
        call.value.to(dtype),
        mask,
        call.scaling,
    )


def kernel_deviation(length: int, device: str) -> dict[str, float]:
    """Relative deviation from float64 of the error and of both gradients."""
    call, *rest = random_call(length, torch.float64, device)
    exact = error_and_gradients(call, *rest)
    single = error_and_gradients(
        in_dtype(call, torch.float32), *(x.float() for x in rest)
    )
    return {
        name: float((found - wanted).norm() / wanted.norm())
        for name, found, wanted in zip(
            ("error", "query", "key"), single, exact, strict=True
        )
    }


def milliseconds(function: Callable[[], Any], repeats: int = 10) -> float:
    """Median time by CUDA events, after a warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def kernel_speed(length: int, device: str) -> dict[str, float]:
    """Fused against plain, error and gradient of one sample: ms and peak MB."""
    arguments = random_call(length, torch.float32, device)
    found: dict[str, float] = {}
    fusible = matrix._fusible
    for name, choice in (("fused", fusible), ("plain", lambda _: False)):
        matrix._fusible = choice
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found[f"{name} ms"] = milliseconds(lambda: error_and_gradients(*arguments))
        found[f"{name} MB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    matrix._fusible = fusible
    return found


def pruning(layers: int, samples: int, length: int, width: int) -> dict[str, Any]:
    """Seconds, by layer too, and peak memory of the whole recipe."""
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
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    tokens = torch.randint(config.vocab_size, (samples, length))
    per_layer: list[str] = []
    sink = logger.add(
        lambda line: per_layer.append(line.record["message"]), level="METRIC"
    )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    # oneshot wants to know where a model and its tokenizer come from
    model.config.name_or_path = str(MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    compress(model, tokenizer, load_recipe(RECIPE).modifiers, tokens)
    seconds = time.perf_counter() - start
    logger.remove(sink)
    return {
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens.numel(),
        "seconds": seconds,
        "seconds per layer": seconds / layers,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "log": per_layer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument(
        "--cpu", action="store_true", help="run the pruning part without a GPU"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.cpu:
        print("skipped: no CUDA device, and this measures one")
        return
    found: dict[str, Any] = {"torch": torch.__version__}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["deviation from float64"] = kernel_deviation(512, "cuda")
        found["kernels"] = {n: kernel_speed(n, "cuda") for n in (1024, args.length)}
    found["pruning"] = pruning(args.layers, args.samples, args.length, args.width)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
