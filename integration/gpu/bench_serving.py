"""A 2:4 model of Llama-3.1-8B's shape against the same weights dense, end to end.

    python integration/gpu/bench_serving.py --dtype bf16 --out out/gpu

Needs a CUDA GPU and vLLM with this package; without a GPU it says so and ends with 0.
The weights are random, made once, stored dense with the note in config.json: served
without the plugin they are the dense model. CUDA graphs are on. Every engine is a
process of its own. Writes serving-DTYPE.md and .json.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmc_attnmask.checkpoint import marker

BATCHES = (1, 16, 128)
PROMPT, ANSWER = 128, 256  # tokens, for the speed of decoding
LONG = 2048  # tokens, for the time to the first one
REPEATS = 5
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


def quantization(dtype: str) -> dict[str, Any] | None:
    """W8A8 as compressed-tensors describes it, tokens quantized while serving."""
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
    """Rows and columns of the linear layers of one decoder layer."""
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


def random_2of4(rows: int, columns: int, device: str) -> Tensor:
    """bf16, of a size at which activations stay in range layer after layer."""
    weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    order = torch.rand(rows, columns // 4, 4, device=device).argsort(-1)
    pruned = (order < 2).view(rows, columns)
    return weight.mul_((2 / columns) ** 0.5).masked_fill_(pruned, 0.0)


def quantized(weight: Tensor, dtype: str) -> dict[str, Tensor]:
    """Tensors of one linear layer, by suffix."""
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
    """Files of the checkpoint, one decoder layer in memory at a time."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    table: Any = {"device": device, "dtype": torch.bfloat16}
    yield (
        "model-ends.safetensors",
        {
            "model.embed_tokens.weight": torch.randn(vocabulary, hidden, **table),
            "lm_head.weight": torch.randn(vocabulary, hidden, **table) / hidden**0.5,
            "model.norm.weight": torch.ones(hidden, **table),
        },
    )
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.{norm}.weight": torch.ones(hidden, **table)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for name, shape in linears(config).items():
            parts = quantized(random_2of4(*shape, device), dtype)
            tensors |= {f"{prefix}.{name}.{part}": parts[part] for part in parts}
        yield f"model-layer-{layer:02}.safetensors", tensors


def make_model(
    folder: Path, config: dict[str, Any], dtype: str, device: str = "cuda"
) -> None:
    """A whole random checkpoint; a folder that is there already is used again."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    index: dict[str, str] = {}
    for file, tensors in shards(config, dtype, device):
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(kept, folder / file, {"format": "pt"})
        index |= dict.fromkeys(kept, file)
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
    (folder / "config.json").write_text(json.dumps(described, indent=2))  # last


def serve(model: str, batches: tuple[int, ...], long: int) -> dict[str, Any]:
    """Speeds of one engine in this process."""
    import vllm

    engine = vllm.LLM(
        model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=max(long, PROMPT + ANSWER) + 8,
        enable_prefix_caching=False,
    )
    vocabulary = engine.llm_engine.model_config.get_vocab_size()

    def seconds(batch: int, prompt: int, answer: int) -> float:
        prompts = [
            {"prompt_token_ids": torch.randint(vocabulary, (prompt,)).tolist()}
            for _ in range(batch)
        ]
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def median(*arguments: int) -> float:
        seconds(*arguments)  # warm-up
        return statistics.median(seconds(*arguments) for _ in range(REPEATS))

    result: dict[str, Any] = {"vllm": vllm.__version__}
    for batch in batches:
        first = median(batch, PROMPT, 1)
        whole = median(batch, PROMPT, ANSWER)
        result[f"tokens/s, batch {batch}"] = batch * (ANSWER - 1) / (whole - first)
    result[f"ms to the first token of {long}"] = 1000 * median(1, long, 1)
    return result


def in_own_process(model: Path, environment: dict[str, str]) -> dict[str, Any]:
    """``serve`` with other environment variables."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import bench_serving as b; "
        "print('RESULT', json.dumps(b.serve(sys.argv[2], b.BATCHES, b.LONG)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, Path(__file__).parent, model],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["bf16", "fp8", "int8"], default="bf16")
    parser.add_argument("--model", type=Path, help="folder for the random checkpoint")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA GPU on this machine")
        return
    model = args.model or args.out / f"llama-8b-{args.dtype}"
    # in a process of its own, which gives the GPU's memory back
    subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
            "import bench_serving as b; "
            "b.make_model(Path(sys.argv[2]), b.LLAMA_8B, sys.argv[3])",
            *(Path(__file__).parent, model, args.dtype),
        ],
        check=True,
    )
    found = {
        "dense, stock vLLM": in_own_process(model, {"VLLM_PLUGINS": ""}),
        "2:4, llmc-attnmask": in_own_process(model, {}),
    }
    report = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "runs": found,
    }
    dense, sparse = found.values()
    lines = [
        f"# A random {args.dtype} model of Llama-3.1-8B's shape",
        "",
        *(f"- {key}: {report[key]}" for key in ("date", "gpu", "torch")),
        f"- vllm: {dense['vllm']}",
        "",
        f"| | {' | '.join(found)} | ratio |",
        "|---|--:|--:|--:|",
        *(
            f"| {key} | {dense[key]:.1f} | {sparse[key]:.1f} "
            f"| {sparse[key] / dense[key]:.2f} |"
            for key in dense
            if key != "vllm"
        ),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"serving-{args.dtype}"
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
