"""Identify an interrupted run by everything that the bytes of its result depend on."""

import hashlib
from pathlib import Path

from transformers import PreTrainedConfig

from llmc_attnmask.runlog.versions import versions


def fingerprint(
    model: str | Path,
    config: PreTrainedConfig,
    recipe: Path,
    data: bytes,
    seed: int,
) -> dict[str, str]:
    """Return what a result depends on, except the machine: name -> value.

    :param model: local folder, whose files are identified by name, size and time; or
        name on the Hub, which is identified by its revision
    :param data: identifies the calibration data
    """
    weights = sorted(Path(model).glob("*.safetensors"))
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weights]
    return {
        "model": str(Path(model).resolve() if weights else model),
        "revision": str(getattr(config, "_commit_hash", None)),
        "weights": _digest(repr(files).encode()),
        "config": _digest(config.to_json_string().encode()),
        "recipe": _digest(recipe.read_bytes()),
        "calibration data": _digest(data),
        "seed": str(seed),
        "versions": ", ".join(f"{name} {found}" for name, found in versions().items()),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
