"""vLLM processes for the serving tests.

Every process has its own environment: with or without the plugin, on one or two ranks.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOKENS = 6
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
WITHOUT_PLUGIN = {"VLLM_PLUGINS": ""}
DENSE = {"LLMC_ATTNMASK_KERNEL": "dense"}
SPARSE = {"LLMC_ATTNMASK_KERNEL": "sparse"}  # even where dense is faster
INTERPRETED = {"TRITON_INTERPRET": "1", "LLMC_ATTNMASK_KERNEL": "triton"}
TWO_RANKS = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
TP = {"tensor_parallel_size": 2}
SECONDS = 300  # for one process; each takes a fraction of it


@dataclass(frozen=True)
class Run:
    """Checkpoints that one process serves one after another."""

    environment: dict[str, str]
    models: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    lora: str | None = None
    tokens: int = TOKENS  # generated for each prompt


@dataclass(frozen=True)
class Output:
    results: dict[str, Any]  # by model
    log: str


PACKED = ["bf16", "int8", "mixed", "planned", "biased"]
LONG = ["bf16-dense", "unstructured-dense", "unstructured-int8-dense"]

RUNS = {
    "stock": Run(
        WITHOUT_PLUGIN,
        [
            *("bf16-dense", "int8-dense", "fp8-dense", "mixed-dense", "planned-dense"),
            *("biased-dense", "unstructured-dense", "unstructured-int8-dense"),
        ],
    ),
    "dense": Run(
        DENSE,
        [*(f"{name}-packed" for name in PACKED), "fp8-packed", "unstructured-packed"],
    ),
    "sparse": Run(
        SPARSE,
        [
            *(f"{name}-packed" for name in PACKED),
            *("bf16-dense", "int8-dense", "fp8-packed"),
            *("unstructured-dense", "unstructured-packed", "unstructured-int8-packed"),
        ],
    ),
    "stock long": Run(WITHOUT_PLUGIN, LONG, tokens=256),
    "sparse long": Run(SPARSE, LONG, tokens=256),
    "timed": Run({}, ["bf16-packed", "int8-dense"]),
    "compiled": Run(
        SPARSE | {"TORCHDYNAMO_DISABLE": "0"},
        ["unstructured-int8-dense"],
        {"enforce_eager": False},
    ),
    "stock lora": Run(WITHOUT_PLUGIN, ["bf16-dense"], lora="adapter"),
    "dense lora": Run(DENSE, ["bf16-packed"], lora="adapter"),
    "sparse lora": Run(SPARSE, ["bf16-packed"], lora="adapter"),
    "interpreted": Run(INTERPRETED, ["bf16-packed", "int8-dense"]),
    "made up": Run(SPARSE, ["bf16-packed"], {"load_format": "dummy"}),
    "stock tp": Run(TWO_RANKS | WITHOUT_PLUGIN, ["bf16-dense"], TP),
    "dense tp": Run(TWO_RANKS | DENSE, ["bf16-packed"], TP),
    "sparse tp": Run(TWO_RANKS | SPARSE, ["bf16-packed"], TP),
}


def generate(run: Run, checkpoints: Path, folder: Path) -> Output:
    folder.mkdir()
    jobs = [
        {
            "model": str(checkpoints / model),
            "options": run.options,
            "lora": str(checkpoints / run.lora) if run.lora else None,
            "tokens": run.tokens,
        }
        for model in run.models
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [
            *(sys.executable, HERE / "generate.py"),
            *(folder / "jobs.json", folder / "results.json"),
        ],
        cwd=folder,  # not the repository, from which the editable install is imported
        env=os.environ | ENVIRONMENT | run.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    results = json.loads((folder / "results.json").read_text())
    return Output(dict(zip(run.models, results, strict=True)), done.stdout)


@contextmanager
def server(model: Path, log: Path) -> Iterator[str]:
    """Run ``vllm serve`` on a free port of 127.0.0.1 until the block ends.

    :return: the base URL of its OpenAI API
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command: list[str | Path] = [
        *(Path(sys.executable).with_name("vllm"), "serve", model),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "sparse"),
        *("--enforce-eager", "--dtype", "bfloat16", "--max-model-len", "128"),
        *("--gpu-memory-utilization", "0.2"),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | ENVIRONMENT,
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_open(port, process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # its engine, too
            process.wait(timeout=60)


def _wait_until_open(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-5000:]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError(f"no server within {SECONDS} s: {log.read_text()[-5000:]}")
