"""The calibration data of ``real.py``, and what identifies data and models."""

import argparse
import hashlib
from pathlib import Path
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmc_attnmask.checkpoint.io.atomic import PROGRESS
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.oneshot.calibration_data import CalibrationData
from llmc_attnmask.runlog.progress import Progress


def calibration(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, length: int
) -> Tensor:
    """Return the windows; the model's own answers are kept beside the file of rows."""
    data = CalibrationData(
        args.calibration, tokenizer, "text", args.num_samples, length, seed=0
    )
    known = model_digest(args.model).encode() + data.identity
    name = hashlib.sha256(known).hexdigest()[:16]
    folder = args.out.parent / f"calibration-{name}" / PROGRESS
    kept = Progress(folder, {"data": name}, [])
    model = load(args.model, dtype="auto") if data.sampled else None
    return data.windows(cast(PreTrainedModel, model), kept)


def calibration_name(datasets: list[str]) -> str:
    return " + ".join(
        name if name.startswith("builtin:") else Path(name).name for name in datasets
    )


def windows_digest(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def model_digest(model: str | Path) -> str:
    """Identify a model by the bytes of its weights, or on the Hub by its name."""
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        return str(model)
    digest = hashlib.sha256((Path(model) / "config.json").read_bytes())
    for file in files:
        with file.open("rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()
