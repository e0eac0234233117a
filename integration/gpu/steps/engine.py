"""Measure one vLLM engine: tokens per second, time to first token, and answers.

``--plugin off`` is stock vLLM with the same weights, dense. By default the engine uses
what a reduced vLLM has: Triton's attention, no torch.compile, and CUDA graphs of the
decode batches only; ``--as-installed`` leaves all of that to vLLM. Both engines of a
comparison run the same way.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial
from typing import Any

from integration.gpu.context import Context
from integration.gpu.steps import checkpoint

BATCHES = (1, 16, 128)
PROMPT, ANSWER = 64, 128  # tokens, for the speed of decoding
FIRST = (256, 2048)  # tokens of a prompt, for the time to the first one of the answer
COMPARED = (16, 96, 24)  # prompts, their tokens, tokens of the answers
REPEATS = 3
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=["bf16", "fp8", "int8"], default="bf16")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--plugin", choices=["on", "off"], default="on")
    parser.add_argument("--kernel", help="LLMC_ATTNMASK_KERNEL; by default, unset")
    parser.add_argument("--as-installed", action="store_true")


def arguments(as_installed: bool, trial: bool, longest: int) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM``."""
    found: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": longest,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if trial:
        return found | {"enforce_eager": True, "max_num_seqs": 16}
    if as_installed:
        return found
    return found | {
        "gpu_memory_utilization": 0.8,
        "max_num_seqs": max(BATCHES),
        "attention_backend": "TRITON_ATTN",
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": list(BATCHES),
        },
    }


class Server:
    """An engine and its vocabulary."""

    def __init__(self, model: str, how: dict[str, Any]) -> None:
        import vllm

        self.vllm = vllm
        self.engine = vllm.LLM(model, **how)
        self.vocabulary = self.engine.llm_engine.model_config.get_vocab_size()

    def answers(self, batch: int, prompt: int, answer: int, seed: int) -> list[Any]:
        """Return answers to random prompts; the same seed gives the same prompts."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(self.vocabulary, (batch, prompt), generator=generator)
        sampling = self.vllm.SamplingParams(
            temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False
        )
        found: list[Any] = self.engine.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts.tolist()],
            sampling,
            use_tqdm=False,
        )
        return found

    def seconds(self, batch: int, prompt: int, answer: int, repeats: int) -> float:
        """Measure the median time in seconds, after one warm-up."""
        times = []
        for seed in range(repeats + 1):
            start = time.perf_counter()
            self.answers(batch, prompt, answer, seed)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def tokens(self, count: int, prompt: int, answer: int) -> list[list[int]]:
        """Return the tokens of greedy answers."""
        found = self.answers(count, prompt, answer, seed=1000)
        return [list(one.outputs[0].token_ids) for one in found]

    def decoding(self, batch: int, answer: int, repeats: int) -> dict[str, float]:
        """Measure the speed of decoding a batch, after the first tokens."""
        first = self.seconds(batch, PROMPT, 1, repeats)
        whole = self.seconds(batch, PROMPT, answer, repeats)
        if whole <= first:
            raise RuntimeError(
                f"{answer} tokens took {whole:.4f} s and one took {first:.4f} s; "
                "expected more tokens to take longer: other work disturbs the machine"
            )
        return {
            "tokens_per_s": batch * (answer - 1) / (whole - first),
            "ms_per_step": 1000 * (whole - first) / (answer - 1),
        }

    def to_the_first(self, prompt: int, repeats: int) -> dict[str, float]:
        """Measure the milliseconds from a prompt to the first generated token."""
        return {"ms": 1000 * self.seconds(1, prompt, 1, repeats)}

    def kernels(self, sparse: bool) -> dict[str, str]:
        """Return which kernels serve the layers.

        :param sparse: whether the plugin is on
        :raises RuntimeError: if it is on, but no layer is sparse
        """
        (found,) = self.engine.apply_model(kernels)
        if sparse and not set(found) - {"dense"}:
            raise RuntimeError(
                "every layer is served dense; a table in the log gives the reasons"
            )
        return {"layers_by_kernel": json.dumps(found)}

    def weights(self) -> dict[str, float]:
        """Measure the bytes of the decoder's linear layers, in any form."""
        return {"linear_gb": sum(self.engine.apply_model(linear_bytes)) / 1e9}


def kernels(model: Any) -> dict[str, int]:
    """Count the decoder's linear layers by the kernels that serve them."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if ".layers." in name and name.endswith("_proj"):
            forms = {"cuda": "weight_arrived", "cusparselt": "weight_cusparselt"}
            kinds = [k for k, form in forms.items() if hasattr(module, form)]
            kinds = [k for k in kinds if getattr(module, forms[k]) is not None]
            kind = " and ".join(kinds) or "dense"
            found[kind] = found.get(kind, 0) + 1
    return found


def linear_bytes(model: Any) -> int:
    """Return the bytes of the decoder's linear layers, with scales and biases."""
    seen: dict[int, int] = {}
    for name, module in model.named_modules():
        if ".layers." in name and name.endswith("_proj"):
            for tensor in (*module.parameters(), *module.buffers()):
                storage = tensor.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def agreement(tokens: list[list[int]], others: list[list[int]]) -> dict[str, float]:
    """Return the share of equal first tokens, and of answers before they differ."""
    first, before = [], []
    for one, other in zip(tokens, others, strict=True):
        equal = [a == b for a, b in zip(one, other, strict=True)]
        first.append(equal[0])
        before.append([*equal, False].index(False) / len(equal))
    return {
        "first_tokens_equal": statistics.fmean(first),
        "equal_until_they_part": statistics.fmean(before),
    }


def run(context: Context, options: argparse.Namespace) -> None:
    os.environ.update(ENVIRONMENT)
    if not options.as_installed:
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if options.plugin == "off":
        os.environ["VLLM_PLUGINS"] = ""
    if options.kernel:
        os.environ["LLMC_ATTNMASK_KERNEL"] = options.kernel
    trial = context.trial
    case: dict[str, Any] = {
        "dtype": options.dtype,
        "layers": options.layers,
        "plugin": options.plugin,
        "kernel": options.kernel,
        "as_installed": options.as_installed,
    }
    answer, repeats = (8, 1) if trial else (ANSWER, REPEATS)
    batches, first = ((1, 4), (16,)) if trial else (BATCHES, FIRST)
    compared = (3, 16, 6) if trial else COMPARED
    model = checkpoint.made(context.rows(), options.dtype, options.layers)
    how = arguments(options.as_installed, trial, max(first) + answer + PROMPT)
    servers: list[Server] = []

    def start() -> dict[str, Any]:
        begun = time.monotonic()
        servers.append(Server(str(model), how))
        return {
            "seconds": time.monotonic() - begun,
            "vllm": servers[0].vllm.__version__,
            "arguments": json.dumps(how),
        }

    context.attempt(case | {"of": "start"}, start)
    if not servers:
        return
    server = servers[0]
    sparse = options.plugin == "on" and not trial
    served = partial(server.kernels, sparse)
    if context.attempt(case | {"of": "kernels"}, served) is None and sparse:
        return  # the engine to measure has no sparse layer
    context.attempt(case | {"of": "memory"}, server.weights)
    context.attempt(
        case | {"of": "tokens"}, partial(greedy, context, server, case, compared)
    )
    for batch in batches:
        context.attempt(
            case | {"of": "decode", "batch": batch},
            partial(server.decoding, batch, answer, repeats),
        )
    for length in first:
        context.attempt(
            case | {"of": "first token", "prompt": length},
            partial(server.to_the_first, length, repeats),
        )


def greedy(
    context: Context, server: Server, case: dict[str, Any], size: tuple[int, int, int]
) -> dict[str, Any]:
    """Return greedy answers and how far they agree with the stock engine's."""
    found = server.tokens(*size)
    result: dict[str, Any] = {"tokens": found}
    stock = case | {"plugin": "off", "kernel": None, "of": "tokens"}
    for row in reversed(context.rows()):
        if stock.items() <= row.items() and "tokens" in row:
            return result | agreement(found, row["tokens"])
    return result
