"""The table of the rows that ``real.py`` has measured."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from integration.gpu import record

Row = dict[str, Any]
Key = tuple[str, str, str, str]
SCOPES = {"q/k": "q and k", "block": "whole block"}
REFERENCE = "SparseGPT"


def read(path: Path) -> list[Row]:
    """Return the complete rows of a file.

    A row replaces an earlier one that has the same name, calibration and seed: that of
    a recipe, for example, that has been changed since.

    :raises FileNotFoundError: if there is no such file
    """
    rows = record.read(path, key="digest").rows
    return list({(row["model"], *_key(row), row["seed"]): row for row in rows}.values())


def written(path: Path) -> str:
    """Return a file's tables, one per model under its name."""
    rows = read(path)
    models = dict.fromkeys(row["model"] for row in rows)
    return "\n\n".join(
        f"{model}\n\n{markdown([row for row in rows if row['model'] == model])}"
        for model in models
    )


def markdown(rows: list[Row], label: Callable[[str], str] = str) -> str:
    """Return one line per method, structure and calibration, in the rows' order.

    Seeds share a line, which has their means. A gap is the perplexity minus the dense
    model's; nats are the logarithm of their ratio. Both are followed by what they are
    as a multiple of SparseGPT's with the same structure and calibration. "same token"
    and "KL" compare with the dense model on its own answers.

    :param rows: of one model
    :param label: writes the name of a method
    """
    texts = list(dict.fromkeys(name for row in rows for name in row["texts"]))
    columns = ["pruned", "calibration", "method"]
    for text in texts:
        columns += [f"{text}: perplexity", "gap (x SparseGPT's)", "nats (x)"]
    columns += ["same token", "KL", "attention error", "seconds", "peak GB"]
    lines = _head(columns)
    groups = _grouped(rows)
    for (scope, structure, samples, method), group in groups.items():
        dense = method == "dense"
        cells = [
            "" if dense else f"{SCOPES[scope]}, {structure}",
            "" if dense else samples,
            label(method),
        ]
        stock = groups.get((scope, structure, samples, REFERENCE))
        for text in texts:
            cells.append(_mean(group, text, "perplexity", ".2f"))
            for field in ("gap", "nats"):
                cells.append("" if dense else _loss(group, stock, text, field))
        cells += _answers(group)
        errors = [row["attention_error"] for row in group]
        cells.append("" if None in errors else f"{sum(errors) / len(errors):.4f}")
        for field, digits in (("seconds", ".0f"), ("peak_gb", ".2f")):
            values = [row[field] for row in group]
            cells.append("" if dense else f"{sum(values) / len(values):{digits}}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: list[Row], label: Callable[[str], str] = str) -> str:
    """Return the lines that readers look at first: losses, answers and seconds.

    :param rows: of one model
    :param label: writes the name of a method
    """
    texts = list(dict.fromkeys(name for row in rows for name in row["texts"]))[:2]
    columns = ["pruned", "calibration", "method"]
    for text in texts:
        columns += [text, "gap, x SparseGPT's"]
    columns += ["same token", "seconds"]
    lines = _head(columns)
    groups = _grouped(rows)
    for (scope, structure, samples, method), group in groups.items():
        dense = method == "dense"
        stock = groups.get((scope, structure, samples, REFERENCE))
        cells = [
            "" if dense else f"{SCOPES[scope]}, {structure}",
            "" if dense else samples,
            label(method),
        ]
        for text in texts:
            cells.append(_mean(group, text, "perplexity", ".2f"))
            cells.append("" if dense else _ratio(group, stock, text))
        cells += [_answers(group)[0], "" if dense else f"{group[0]['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _head(columns: list[str]) -> list[str]:
    """Write the names of the columns; the first three are text, the others numbers."""
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * 3}{'--:|' * (len(columns) - 3)}",
    ]


def _ratio(group: list[Row], stock: list[Row] | None, text: str) -> str:
    """Write a gap as a multiple of SparseGPT's, if that is known and positive."""
    reference = _values(stock, text, "gap") if stock else []
    gaps = _values(group, text, "gap")
    if not gaps or sum(reference) <= 0:
        return ""
    return f"{sum(gaps) / len(gaps) / (sum(reference) / len(reference)):.2f}"


def _answers(group: list[Row]) -> list[str]:
    """Write the share of equal tokens and the KL divergence on the model's answers."""
    found = [row["answers"] for row in group if row.get("answers")]
    if not found:
        return ["", ""]
    same, kl = (sum(f[k] for f in found) / len(found) for k in ("agreement", "kl"))
    return [f"{same:.1%}", f"{kl:.3f}"]


def _grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Map names to the rows of all seeds."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    return groups


def _key(row: Row) -> Key:
    """Return scope, structure, calibration and method."""
    used = row["calibration"]
    # the dense row needs no calibration, and all calibrations share it
    samples = (
        ""
        if row["method"] == "dense"
        else f"{used['windows']} x {used['length']} of {_short(used['text'])}"
    )
    return row["scope"], row["structure"], samples, row["method"]


def _short(calibration: str) -> str:
    return calibration.replace("-calibration.jsonl", "")


def _values(group: list[Row], text: str, field: str) -> list[float]:
    return [row["texts"][text][field] for row in group if text in row["texts"]]


def _mean(group: list[Row], text: str, field: str, digits: str) -> str:
    values = _values(group, text, field)
    return f"{sum(values) / len(values):{digits}}" if values else ""


def _loss(group: list[Row], stock: list[Row] | None, text: str, field: str) -> str:
    """Write a mean, its range over seeds, and the multiple of SparseGPT's."""
    values = _values(group, text, field)
    if not values:
        return ""
    digits = 2 if field == "gap" else 3
    mean = sum(values) / len(values)
    written = f"{mean:+.{digits}f}"
    if len(values) > 1:
        written += f" [{min(values):+.{digits}f}, {max(values):+.{digits}f}]"
    reference = _values(stock, text, field) if stock else []
    if sum(reference) > 0:  # otherwise it lost nothing, and a multiple says nothing
        written += f" ({mean / (sum(reference) / len(reference)):.2f})"
    return written
