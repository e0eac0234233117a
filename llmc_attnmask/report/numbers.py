"""Collect the numbers of a run for ``report.json``, which ``schema.json`` describes."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmc_attnmask.checkpoint.inspect import inspect
from llmc_attnmask.checkpoint.io.files import open_checkpoint
from llmc_attnmask.masks.record import count_violations, get_mask
from llmc_attnmask.report.token_bytes import bytes_per_token
from llmc_attnmask.runlog.journal import entries, run_metadata
from llmc_attnmask.runlog.versions import versions

VERSION = 1

Report = dict[str, Any]


def of_model(model: PreTrainedModel) -> Report:
    """Report what a model in memory knows about its pruning, before it is saved."""
    known = run_metadata(model)
    return reduced() | {
        "base_model": model.config.name_or_path or None,
        "architecture": type(model).__name__,
        "device": _device(),
        "versions": versions() | {"python": platform.python_version()},
        "options": dict(known.get("options", {})),
        "plan": known.get("plan"),
        "modifiers": list(known.get("modifiers", [])),
        "warnings": list(known.get("warnings", [])),
        "layers": [
            {"modifier": e.modifier, "layer": e.layer, **e.measurements}
            for e in entries(model)
        ],
        "masks": _masks(model),
    }


def of_folder(directory: Path) -> Report:
    """Report what a checkpoint's files show without the run that wrote them."""
    layers = inspect(directory)
    two_of_four = {layer.name for layer in layers if layer.two_of_four}
    token_bytes = bytes_per_token(open_checkpoint(directory), two_of_four)
    return {
        "checkpoint": [asdict(layer) | {"shape": [*layer.shape]} for layer in layers],
        "reading": [asdict(layer) for layer in token_bytes],
        "recipe": _text(directory / "recipe.yaml"),
    }


def reduced() -> Report:
    """Stand in for ``of_model`` where no run has left its numbers."""
    return {
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": None,
        "architecture": None,
        "device": None,
        "versions": {},
        "options": {},
        "plan": None,
        "modifiers": [],
        "warnings": [],
        "layers": [],
        "masks": [],
        "evaluation": [],
        "tasks": [],
    }


def missing(report: Mapping[str, Any]) -> list[str]:
    """List, in words, what a report can contain and this one does not."""
    absent = []
    if not report["modifiers"]:
        absent.append(
            "report.json of the run: errors, learning curves, attention maps, masks "
            "and versions are unknown"
        )
    elif not any(layer.get("compared") for layer in report["layers"]):
        absent.append(
            "attention errors: no layer was pruned by AttentionMatrixPruningModifier"
        )
    if not report["evaluation"] and not report["tasks"]:
        absent.append(
            "perplexity: to measure it, run llmc-attnmask eval DIR --reference MODEL "
            "--update-report"
        )
    return absent


def _masks(model: nn.Module) -> list[dict[str, Any]]:
    """Count each masked layer's pruned entries and those that are no longer zero."""
    found = []
    for name, module in model.named_modules():
        kept = get_mask(module)
        weight = cast(Tensor | None, getattr(module, "weight", None))
        if kept is not None and weight is not None and weight.is_floating_point():
            found.append(
                {
                    "layer": name,
                    "entries": kept.numel(),
                    "pruned": int((~kept).sum()),
                    "filled": count_violations(module),
                }
            )
    return found


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
