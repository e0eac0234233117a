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
from generate import LOGPROBS, PROMPTS, TOKENS
from openai import OpenAI
from processes import ENVIRONMENT, HERE, WITHOUT_PLUGIN, Output, server

Outputs = dict[str, Future[Output]]


@pytest.mark.parametrize(
    "model",
    [
        *("bf16-packed", "bf16-dense", "int8-packed", "int8-dense"),
        *("fp8-packed", "mixed-packed", "planned-packed", "biased-packed"),
    ],
)
def test_answers_equal_those_of_the_same_weights_stored_dense(
    outputs: Outputs, model: str
) -> None:
    expected = outputs["stock"].result().results
    found = outputs["plugin"].result().results
    assert found[model] == expected[model.replace("packed", "dense")]


def test_the_log_says_which_kernel_each_layer_got(outputs: Outputs) -> None:
    log = outputs["plugin"].result().log
    assert log.count("llmc-attnmask: kernels of the 2:4 layers") == 8
    row = r"4 +qkv_proj +512 x 192 +packed +dense +no sparse kernel on cpu"
    assert re.search(row, log)
    assert "not all of its parts are 2:4" in log  # q and k of mixed-packed


def test_without_the_plugin_the_log_does_not_mention_it(outputs: Outputs) -> None:
    log = outputs["stock"].result().log
    # a clone's folder may have that name, too, and is part of the models' paths
    assert "llmc-attnmask" not in log.replace(str(HERE.parents[1]), "")


def test_lora_adapters_work_on_packed_layers(outputs: Outputs) -> None:
    stock = outputs["stock lora"].result().results["bf16-dense"]
    assert outputs["plugin lora"].result().results["bf16-packed"] == stock
    assert stock != outputs["stock"].result().results["bf16-dense"]


def test_two_ranks_answer_like_stock_vllm(outputs: Outputs) -> None:
    stock = outputs["stock tp"].result().results["bf16-dense"]
    assert outputs["plugin tp"].result().results["bf16-packed"] == stock


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


def test_dummy_weights_are_pruned_and_served_sparse(outputs: Outputs) -> None:
    output = outputs["made up"].result()
    row = (
        r"4 +(\w+) +\d+ x \d+ +packed +triton +LLMC_ATTNMASK_KERNEL=triton; "
        "random weights, pruned at load"
    )
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
        assert choice.logprobs.token_logprobs == pytest.approx(likeliest, abs=1e-6)


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
