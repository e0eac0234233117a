"""Serve a model dense, 2:4 and 60 % unstructured, in bf16 and INT8, and compare them.

    make demo-serve              # Llama-3.2-1B's shape, random weights: speed
    make demo-serve REAL=1       # and the real model, pruned for that: over an hour

Engines are there at the same time and measure in turn, so that all see the same
machine. Results are written to FOLDER/demo-serve.jsonl, a line per engine.
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
REFERENCE = ("bf16", "dense")
WORDS = 48  # tokens of an answer, at most
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # eager, as --enforce-eager is
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
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
    model: str, folders: dict[tuple[str, str], Path], log: Path, rounds: int, ask: bool
) -> list[dict[str, object]]:
    """Serve checkpoints at the same time and measure them in turn.

    :param folders: by type and what the weights are; dense bf16, which the others are
        compared with, first
    :return: a row for each
    """
    engines: list[Served] = []
    try:
        for (dtype, weights), folder in folders.items():
            name = {"model": model, "type": dtype, "weights": weights}
            print(f"loading {model}, {dtype}, {weights}", flush=True)
            engines.append(Served.start(folder, log, ask, **name))
        for i in range(rounds):
            for engine in engines[i % len(engines) :] + engines[: i % len(engines)]:
                engine.measure()
        return [
            engine.row(
                reference=engines[0].measured[table.BATCHES[0]],
                answers=[engine.call("ask", q, WORDS) for q in QUESTIONS * ask],
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
    parser.add_argument("--rounds", type=int, default=4)
    metavar = ("DENSE", "2OF4", "60")
    parser.add_argument("--real", nargs=3, type=Path, metavar=metavar)
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    log, results = args.folder / "engines.log", args.folder / "demo-serve.jsonl"
    log.unlink(missing_ok=True)
    made: dict[tuple[str, str], Path] = {}
    for dtype, kinds in checkpoints.TYPES.items():
        for weights in kinds:
            print(f"writing {table.SHAPE}, {dtype}, {weights}", flush=True)
            made[dtype, weights] = checkpoints.make(args.folder, weights, dtype)
    runs = []
    for dtype in checkpoints.TYPES:
        # not all at once, as they have to fit into memory; each time with dense bf16
        own = {key: folder for key, folder in made.items() if key[0] == dtype}
        runs.append((table.SHAPE, {REFERENCE: made[REFERENCE], **own}, False))
    if args.real:
        real = zip(checkpoints.STORAGES, args.real, strict=True)
        folders = {("bf16", weights): folder for weights, folder in real}
        runs.append((args.real[0].name, folders, True))
    rows: list[dict[str, object]] = []
    for model, folders, ask in runs:
        found = compare(model, folders, log, args.rounds, ask)
        known = {(row["model"], row["type"], row["weights"]) for row in rows}
        rows += [
            row
            for row in found
            if (row["model"], row["type"], row["weights"]) not in known
        ]
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table.markdown(rows))
    for line in table.answers(rows):
        print(line)


if __name__ == "__main__":
    main()
