"""Serve a model dense, 2:4 and 60 % unstructured, in bf16 and INT8, and compare them.

    make demo-serve              # Llama-3.2-1B's shape, random weights: speed
    make demo-serve REAL=1       # and the real model, pruned for that: over an hour

The engines of one type are there at the same time and measure in turn, so that all see
the same machine. Results are appended to FOLDER/demo-serve.jsonl, a line per engine.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from integration.demo_serve import checkpoints, table
from integration.demo_serve.protocol import ANSWER

BATCHES = (1, 4, 16)
PROMPT = 512
QUESTIONS = (
    "What is the capital of France?",
    "Why does ice float on water? Answer in one or two sentences.",
)
WORDS = 48  # tokens of an answer, at most
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # eager, as --enforce-eager is
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass
class Served:
    """A process with an engine, and what it has measured."""

    name: dict[str, str]
    process: subprocess.Popen[str]
    start_up: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, folder: Path, log: Path, tokenizer: bool, **name: str) -> "Served":
        """Start an engine and wait until it has loaded its model."""
        command = [sys.executable, "-m", "integration.demo_serve.engine", str(folder)]
        # waiting threads give up their core on their own, as a user's would
        kept = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        with log.open("a") as errors:
            process = subprocess.Popen(
                [*command, *["--tokenizer"] * tokenizer],
                env=kept | ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        served = cls(name, process)
        try:
            served.start_up = served.answer()
        except RuntimeError as error:
            raise RuntimeError(f"{error}; {log} says why") from None
        return served

    def call(self, *request: object) -> Any:
        """Have the engine call one of its functions."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError(f"the engine of {self.name} has ended")

    def measure(self) -> None:
        """Measure everything once."""
        for batch in BATCHES:
            found = self.call("decode", batch)
            self.measured.setdefault(f"tokens/s, batch {batch}", []).append(found)
        first = self.call("first_token", PROMPT)
        self.measured.setdefault(f"first token after {PROMPT}", []).append(first)

    def row(self, **more: object) -> dict[str, object]:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        return {"date": today} | self.name | self.start_up | self.measured | more


def compare(
    model: str, dtype: str, folders: dict[str, Path], log: Path, rounds: int, ask: bool
) -> list[dict[str, object]]:
    """Serve checkpoints of one type at the same time and measure them in turn.

    :param folders: by what their weights are, dense first
    :return: a row for each
    """
    engines: list[Served] = []
    try:
        for weights, folder in folders.items():
            name = {"model": model, "type": dtype, "weights": weights}
            print(f"loading {model}, {dtype}, {weights}", flush=True)
            engines.append(Served.start(folder, log, ask, **name))
        for i in range(rounds):
            for engine in engines[i % len(engines) :] + engines[: i % len(engines)]:
                engine.measure()
        return [
            engine.row(
                answers=[engine.call("ask", q, WORDS) for q in QUESTIONS] if ask else []
            )
            for engine in engines
        ]
    finally:
        for engine in engines:
            engine.process.kill()
            engine.process.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of checkpoints and results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--types", nargs="+", default=checkpoints.TYPES)
    metavar = ("DENSE", "2OF4", "60")
    parser.add_argument("--real", nargs=3, type=Path, metavar=metavar)
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    log, results = args.folder / "engines.log", args.folder / "demo-serve.jsonl"
    log.unlink(missing_ok=True)
    models: list[tuple[str, str, dict[str, Path], bool]] = []
    for dtype in args.types:
        print(f"writing checkpoints of {table.SHAPE}, {dtype}", flush=True)
        made = {
            weights: checkpoints.make(args.folder, weights, dtype)
            for weights in checkpoints.STORAGES
        }
        models.append((table.SHAPE, dtype, made, False))
    if args.real:
        real = dict(zip(checkpoints.STORAGES, args.real, strict=True))
        models.append((args.real[0].name, "bf16", real, True))
    rows = []
    for model, dtype, folders, ask in models:
        rows += compare(model, dtype, folders, log, args.rounds, ask)
        with results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[-len(folders) :])
    print(table.markdown(rows))
    for line in table.answers(rows):
        print(line)


if __name__ == "__main__":
    main()
