"""Real vLLM on the CPU.

2:4 checkpoints with the plugin are compared with the same weights stored dense without
it.

    make test-serving
"""

import os
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from generate import LOGPROBS, PROMPTS
from openai import OpenAI
from processes import (
    ENVIRONMENT,
    HERE,
    RUNS,
    TOKENS,
    WITHOUT_PLUGIN,
    Output,
    server,
)

from llmc_attnmask.serving.kernels.cpu import machine

Outputs = dict[str, Future[Output]]


CLOSE = 0.05  # logprobs: sums in another order, rounded to bf16 in every layer


def stored_dense(model: str) -> str:
    return model.replace("packed", "dense")


@pytest.mark.parametrize("model", RUNS["dense"].models)
def test_layers_kept_dense_answer_exactly_like_stock_vllm(
    outputs: Outputs, model: str
) -> None:
    expected = outputs["stock"].result().results
    assert outputs["dense"].result().results[model] == expected[stored_dense(model)]


@pytest.mark.parametrize("model", RUNS["sparse"].models)
def test_sparse_kernels_answer_like_the_same_weights_served_dense(
    outputs: Outputs, model: str
) -> None:
    stock = outputs["stock"].result().results[stored_dense(model)]
    assert_close(outputs["sparse"].result().results[model], stock)


@pytest.mark.parametrize("model", RUNS["sparse long"].models)
def test_256_greedy_tokens_are_those_of_dense_layers_up_to_a_near_tie(
    outputs: Outputs, model: str
) -> None:
    stock = outputs["stock long"].result().results[model]
    assert all(len(found["tokens"]) == 256 for found in stock)
    found = outputs["sparse long"].result().results[model]
    # a logit between 8 and 16 is rounded to multiples of 1/16
    assert assert_close(found, stock, within=0.07) > 2 * 256


def assert_close(found: list, stock: list, within: float = CLOSE) -> int:
    """Compare logprobs, up to the first token where two are about as likely.

    :return: the tokens that are the same
    """
    compared = same = 0
    for ours, theirs in zip(found, stock, strict=True):
        for step, (first, reference) in enumerate(
            zip(ours["logprobs"], theirs["logprobs"], strict=True)
        ):
            for token in first.keys() & reference.keys():
                assert first[token] == pytest.approx(reference[token], abs=within)
                compared += 1
            if ours["tokens"][step] != theirs["tokens"][step]:
                best = sorted(reference.values())[-2:]
                assert best[1] - best[0] < within
                break
            same += 1
    assert compared > 3 * LOGPROBS
    return same


def test_the_log_says_which_kernel_each_layer_got(outputs: Outputs) -> None:
    log = outputs["dense"].result().log
    assert log.count("llmc-attnmask: kernels of the sparse layers") == 7
    row = (
        r"4 +qkv_proj +512 x 192 +sparse-24-bitmask +dense +LLMC_ATTNMASK_KERNEL=dense"
    )
    assert re.search(row, log)


def test_the_log_says_what_the_parts_of_a_fused_layer_are(outputs: Outputs) -> None:
    log = outputs["sparse"].result().log
    assert log.count("llmc-attnmask: kernels of the sparse layers") == 11
    if (lacking := lacks()) is not None:
        assert lacking in log
        return
    for row in (
        r"4 +gate_up_proj +768 x 192 +sparse-24-bitmask +avx512 +2:4",
        r"4 +qkv_proj +.*-24-bitmask +avx512 +2:4 \(384 rows\) and dense \(128 rows\)",
        r"4 +down_proj +192 x 384 +dense +avx512 +unstructured",
        r"4 +down_proj +192 x 384 +sparse-bitmask +avx512 +unstructured",
        r"4 +qkv_proj +.* unstructured \(256 rows\) and dense \(256 rows\)",
        r"4 +o_proj +.*-24-bitmask +dense +no sparse kernel for float8_e4m3fn on CPUs",
    ):
        assert re.search(row, log), row


def test_by_default_a_layer_is_sparse_if_that_is_faster_here(outputs: Outputs) -> None:
    log = outputs["timed"].result().log
    rows = re.findall(
        r"4 +\w+_proj +\d+ x \d+ +(?:sparse-24-bitmask|dense) +(\w+) +(.*)", log
    )
    assert len(rows) == 8
    for kernel, reason in rows:
        if (lacking := lacks()) is not None:
            assert (kernel, reason) == ("dense", lacking)
        elif kernel == "avx512":
            assert re.fullmatch(r"2:4, \d+\.\d x as fast as dense", reason)
        else:
            assert re.fullmatch(r"2:4 would have [01]\.\d\d x dense's speed", reason)


def lacks() -> str | None:
    """Return why this machine cannot run the CPU kernels."""
    found = machine.flags()
    return machine.lacks(found, torch.int8, two_of_four=False) or (
        machine.unmeasured(found)
    )


def test_without_the_plugin_the_log_does_not_mention_it(outputs: Outputs) -> None:
    log = outputs["stock"].result().log
    # a clone's folder may have that name, too, and is part of the models' paths
    assert "llmc-attnmask" not in log.replace(str(HERE.parents[1]), "")


def test_lora_adapters_work_on_packed_layers(outputs: Outputs) -> None:
    stock = outputs["stock lora"].result().results["bf16-dense"]
    assert outputs["dense lora"].result().results["bf16-packed"] == stock
    assert_close(outputs["sparse lora"].result().results["bf16-packed"], stock)
    assert stock != outputs["stock"].result().results["bf16-dense"]


def test_two_ranks_answer_like_stock_vllm(outputs: Outputs) -> None:
    stock = outputs["stock tp"].result().results["bf16-dense"]
    assert outputs["dense tp"].result().results["bf16-packed"] == stock
    assert_close(outputs["sparse tp"].result().results["bf16-packed"], stock)


@pytest.mark.parametrize("model", ["bf16-packed", "int8-dense"])
def test_the_decode_kernel_in_the_interpreter_answers_like_stock_vllm(
    outputs: Outputs, model: str
) -> None:
    # sums have another order, and bfloat16 is truncated instead of rounded
    expected = outputs["stock"].result().results[model.replace("packed", "dense")]
    output = outputs["interpreted"].result()
    assert "LLMC_ATTNMASK_KERNEL=triton" in output.log
    for ours, stock in zip(output.results[model], expected, strict=True):
        first, reference = ours["logprobs"][0], stock["logprobs"][0]
        assert max(first, key=first.get) in reference
        for token in first.keys() & reference.keys():
            assert first[token] == pytest.approx(reference[token], abs=0.15)


def test_torch_compile_takes_the_sparse_layers(outputs: Outputs) -> None:
    model = "unstructured-int8-dense"
    found = outputs["compiled"].result().results[model]
    # norms and activations are fused, and rounded less often
    assert_close(found, outputs["stock"].result().results[model], within=0.1)


@pytest.mark.skipif(lacks() is not None, reason="this machine cannot run the kernels")
def test_dummy_weights_are_pruned_and_served_sparse(outputs: Outputs) -> None:
    output = outputs["made up"].result()
    row = r"4 +(\w+) +\d+ x \d+ +sparse-24-bitmask +avx512 +2:4; random weights, pru"
    kinds = ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert re.findall(row, output.log) == kinds
    assert all(
        len(found["tokens"]) == TOKENS for found in output.results["bf16-packed"]
    )


def test_vllm_serve_answers_the_openai_client(
    checkpoints: Path, outputs: Outputs, tmp_path: Path
) -> None:
    expected = outputs["stock"].result().results["int8-dense"]
    with server(checkpoints / "int8-packed", tmp_path / "server.log") as url:
        answer = OpenAI(base_url=url, api_key="none").completions.create(
            model="sparse",
            prompt=PROMPTS,
            max_tokens=TOKENS,
            temperature=0,
            logprobs=LOGPROBS,
        )
    assert "llmc-attnmask: kernels" in (tmp_path / "server.log").read_text()
    for choice, stock in zip(answer.choices, expected, strict=True):
        likeliest = [
            step[str(token)]
            for token, step in zip(stock["tokens"], stock["logprobs"], strict=True)
        ]
        assert choice.logprobs.token_logprobs == pytest.approx(likeliest, abs=CLOSE)


def test_a_packed_checkpoint_without_the_plugin_is_refused(checkpoints: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys, vllm; vllm.LLM(sys.argv[1], max_model_len=128)",
            checkpoints / "bf16-packed",
        ],
        env=os.environ | ENVIRONMENT | WITHOUT_PLUGIN,
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "Sparsity support has been removed" in done.stderr
