"""Describe this machine, and measure its memory and its tensor cores."""

import argparse
import hashlib
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import llmc_attnmask
from integration.gpu.context import Context
from integration.gpu.timing import Timer

ROOT = Path(__file__).parents[3]
QUERIES = "driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
COPIED = 2**30  # bytes
PRODUCT = 8192  # rows and columns of both factors
PACKAGES = ("triton", "vllm", "llmcompressor", "compressed-tensors", "transformers")


def versions(device: str) -> dict[str, str | None]:
    """Return the versions that the figures depend on; None for what is missing."""
    found: dict[str, str | None] = {
        "llmc_attnmask": llmc_attnmask.__version__,
        "sources": sources(),
        "commit": _printed("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cusparselt": None,
        "nvcc": _last(_printed("nvcc", "--version")),
        "ncu": _last(_printed("ncu", "--version")),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
        found["capability"] = ".".join(map(str, capability))
        if torch.backends.cusparselt.is_available():
            found["cusparselt"] = str(torch.backends.cusparselt.version())
    return found


def sources() -> str:
    """Return a digest of the package's source files, to identify the measured code."""
    digest = hashlib.sha256()
    files = (ROOT / "llmc_attnmask").rglob("*.*")
    for path in sorted(p for p in files if p.suffix in (".py", ".cu", ".cuh", ".h")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _printed(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _last(text: str | None) -> str | None:
    return text.splitlines()[-1] if text else None


def state() -> dict[str, str]:
    """Return the driver, memory, clocks and power limit; read, not changed."""
    names = QUERIES.split(",")
    printed = _printed(
        "nvidia-smi", f"--query-gpu={QUERIES}", "--format=csv,noheader", "--id=0"
    )
    if printed is None:
        return {}
    values = printed.splitlines()[0].split(",")
    return dict(zip(names, (value.strip() for value in values), strict=True))


def copied(context: Context) -> dict[str, float]:
    """Measure how fast a copy reads and writes, in TB/s."""
    size = COPIED if context.device == "cuda" else 2**20
    source = torch.randint(255, (size,), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    time = Timer(context.device).graph([lambda: target.copy_(source)] * 4)
    return {"copy_tb_per_s": 2 * size / time / 1e6}


def multiplied(context: Context) -> dict[str, float]:
    """Measure how fast a large bf16 product is, in TFLOP/s."""
    size = PRODUCT if context.device == "cuda" else 64
    a, b = (
        torch.randn(size, size, device=context.device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    time = Timer(context.device).graph([lambda: a @ b] * 4)
    return {"product_tflop_per_s": 2 * size**3 / time / 1e6}


def run(context: Context, options: argparse.Namespace) -> None:
    context.attempt({"of": "versions"}, lambda: {"versions": versions(context.device)})
    context.attempt({"of": "state before"}, lambda: {"state": state()})
    context.attempt({"of": "copy"}, lambda: copied(context))
    context.attempt({"of": "product"}, lambda: multiplied(context))
    context.attempt({"of": "state after"}, lambda: {"state": state()})
