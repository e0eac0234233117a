"""Compare one process with several: time, and whether the checkpoints are equal.

    python integration/gpu/several_processes.py [--processes 2] [--model DIR]

It prunes a model with the same command alone and under torchrun, and prints JSON. It
needs one GPU per process, and says so if there are fewer; with ``--cpu`` it runs on
cores, one thread each unless OMP_NUM_THREADS is set.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmc_attnmask.oneshot.shipped import MODEL_DIR

RECIPE = Path(__file__).parents[2] / "recipes" / "block_2of4.yaml"


def seconds(command: list[str], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return time.perf_counter() - start


def differences(first: Path, second: Path) -> dict[str, float]:
    """Return the differences between the weights of two checkpoints of one model."""
    found = {"masks": 0, "entries": 0, "largest": 0.0}
    names = [path.name for path in sorted(first.glob("*.safetensors"))]
    for name in names:
        others = load_file(second / name)
        for key, tensor in load_file(first / name).items():
            a, b = tensor.float(), others[key].float()
            found["masks"] += int(((a == 0) != (b == 0)).sum())
            found["entries"] += int((a != b).sum())
            found["largest"] = max(found["largest"], float((a - b).abs().max()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--dataset", default="builtin:pydoc")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--cpu", action="store_true", help="run without GPUs")
    args = parser.parse_args()
    environment = dict(os.environ)
    if args.cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment.setdefault("OMP_NUM_THREADS", "1")
    elif torch.cuda.device_count() < args.processes:
        print(
            f"skipped: {torch.cuda.device_count()} CUDA devices, but {args.processes} "
            "processes need one each"
        )
        return
    command = ["-m", "llmc_attnmask", "prune", args.model, "--recipe", str(args.recipe)]
    command += ["--dataset", args.dataset, "--num-samples", str(args.num_samples)]
    command += ["--max-length", str(args.max_length), "--output"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    found: dict[str, Any] = {"torch": torch.__version__, "processes": args.processes}
    with tempfile.TemporaryDirectory() as folder:
        alone, together = Path(folder) / "alone", Path(folder) / "together"
        found["seconds alone"] = seconds(
            [sys.executable, *command, str(alone)], environment
        )
        found["seconds together"] = seconds(
            [sys.executable, *torchrun, str(args.processes), *command, str(together)],
            environment,
        )
        found["differences"] = differences(alone, together)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
