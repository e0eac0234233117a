"""Render README.md, the model card, in the format of the Hugging Face Hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from llmc_attnmask.checkpoint.config import packed_storage
from llmc_attnmask.checkpoint.io.files import CONFIG
from llmc_attnmask.checkpoint.io.json_files import read_mapping
from llmc_attnmask.report import view
from llmc_attnmask.report.mark import UNSIGNED, signed
from llmc_attnmask.report.page import environment

Report = Mapping[str, Any]


def render(report: Report, directory: Path) -> str:
    """Render a checkpoint's card: what it is, how to serve it and what was measured.

    :param directory: the checkpoint's folder, from which config.json is read
    """
    config = read_mapping(directory / CONFIG)
    template = environment().get_template("card.md")
    body = template.render(
        report=report,
        mark=UNSIGNED,
        name=_name(report["base_model"]),
        base=report["base_model"],
        on_hub=_on_hub(report["base_model"]),
        storage=packed_storage(config),
        quantized=bool((config.get("quantization_config") or {}).get("config_groups")),
        two_of_four=sum(bool(x["two_of_four"]) for x in report["checkpoint"]),
        zeros=view.decoder_zeros(report),
        attention=_attention_rows(report),
        perplexities=view.perplexities(report),
        token_bytes=view.token_bytes(report),
        recovery=_recovery(report),
    )
    front = yaml.safe_dump(_front_matter(report, config), sort_keys=False)
    return signed(f"---\n{front}---\n\n{body}")


def _front_matter(report: Report, config: Mapping[str, Any]) -> dict[str, Any]:
    base = report["base_model"]
    quantized = bool((config.get("quantization_config") or {}).get("config_groups"))
    front: dict[str, Any] = {"library_name": "transformers"}
    if any("CausalLM" in name for name in config.get("architectures") or []):
        front["pipeline_tag"] = "text-generation"
    if base and _on_hub(base):
        front["base_model"] = base
        if quantized:
            front["base_model_relation"] = "quantized"
    if license_fields := _license(base):
        front |= license_fields
    front["tags"] = ["llmc-attnmask", "llm-compressor", "pruned"]
    if any(layer["two_of_four"] for layer in report["checkpoint"]):
        front["tags"] += ["2:4", "sparse"]
    if "quantization_config" in config:
        front["tags"].append("compressed-tensors")
    return front


def _on_hub(base: str | None) -> bool:
    """Return whether a base model is a name on the Hub rather than a folder."""
    if not base or Path(base).exists():
        return False
    return base.count("/") <= 1 and not base.startswith((".", "/", "~"))


def _name(base: str | None) -> str:
    return base.rstrip("/").rpartition("/")[2] if base else "a model"


def _license(base: str | None) -> dict[str, str]:
    """Return the license fields of the base model's card, if the card is local."""
    if not base:
        return {}
    path: Any = Path(base) / "README.md"
    if _on_hub(base):
        path = try_to_load_from_cache(base, "README.md")
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    front = re.match(r"\s*---\r?\n(.*?)\n---", text, re.DOTALL)
    try:
        data = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:  # the Hub cannot read such a card either
        return {}
    if not isinstance(data, dict):
        return {}
    names = ("license", "license_name", "license_link")
    return {name: str(data[name]) for name in names if data.get(name)}


def _attention_rows(report: Report) -> list[tuple[str, float, float]]:
    """List methods with their mean errors: attention matrix, attention output."""
    return [
        (
            view.METHODS[method],
            view.mean_error(report, method, "matrix"),
            view.mean_error(report, method, "output"),
        )
        for method in view.methods(report)
    ]


def _recovery(report: Report) -> tuple[float, float] | None:
    """Return the mean error of the blocks' outputs, before and after recovery."""
    found = [
        values
        for layer in report["layers"]
        for what, values in layer["errors"].items()
        if what == "block output"
    ]
    if not found:
        return None
    before, after = (sum(v[i] for v in found) / len(found) for i in (0, -1))
    return before, after
