"""The charts of the page: Plotly's data and layout, and the table behind each.

Colors are names of CSS variables ("--ours"); the page fills in those of its theme.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmc_attnmask.report import view

Report = Mapping[str, Any]

# color, marker and line of each method, so that it does not depend on color alone
_STYLES: dict[str, tuple[str, str, str]] = {
    "magnitude": ("--magnitude", "square-open", "dot"),
    "Wanda": ("--wanda", "diamond-open", "dash"),
    "SparseGPT": ("--sparsegpt", "triangle-up-open", "dashdot"),
    "ours": ("--ours", "circle", "solid"),
}
MANY = 24  # layers or heads: from this number on, single ones are not marked
LAYERS = {"title": {"text": "layer"}, "type": "category", "tickangle": 0, "nticks": 12}


@dataclass(frozen=True)
class Chart:
    """One chart."""

    id: str
    title: str
    says: str  # what it shows, for the caption and the alternative text
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    header: list[str]
    rows: list[list[str]]
    height: int = 320  # CSS pixels


def errors(report: Report, kind: str) -> Chart | None:
    """Draw the attention error by layer, of this run and of the baselines.

    :param kind: "matrix" or "output"
    """
    layers = view.attention_layers(report)
    if not layers:
        return None
    names = [view.short(layer["layer"]) for layer in layers]
    methods = view.methods(report)
    data: list[dict[str, Any]] = []
    for method in methods:
        color, symbol, dash = _STYLES[method]
        ours = method == "ours"
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(layers) < MANY else "lines",
                "name": view.METHODS[method],
                "x": names,
                "y": [layer["compared"][method][kind] for layer in layers],
                "line": {"color": color, "width": 3 if ours else 1.5, "dash": dash},
                "marker": {"color": color, "symbol": symbol, "size": 9},
                "hovertemplate": "%{y:.5f}",
            }
        )
    means = {m: view.mean_error(report, m, kind) for m in methods}
    what = {
        "matrix": "Relative error of the attention matrix, ‖A - Ã‖² / ‖A‖²",
        "output": "Relative effect on the attention output, "
        "‖(A - Ã) V Wₒ‖² / ‖A V Wₒ‖²",
    }[kind]
    listed = ", ".join(f"{view.METHODS[m]} {view.error(means[m])}" for m in methods)
    return Chart(
        id=f"error-{kind}",
        title={
            "matrix": "Attention matrix",
            "output": "Effect on the attention output",
        }[kind],
        says=f"{what}, on the validation samples; lower is better. Mean over layers: "
        f"{listed}.",
        data=data,
        layout={
            "xaxis": LAYERS,
            "yaxis": _relative([y for trace in data for y in trace["y"]]),
            "hovermode": "x unified",
        },
        header=["layer", *(view.METHODS[m] for m in methods)],
        rows=[
            [name, *(view.error(layer["compared"][m][kind]) for m in methods)]
            for name, layer in zip(names, layers, strict=True)
        ],
    )


def _relative(values: Sequence[float]) -> dict[str, Any]:
    """Make an axis of relative errors: logarithmic, unless an error is zero."""
    title = {"title": {"text": "relative error"}, "tickformat": "~g"}
    return title | _log(values)


def _log(values: Sequence[float]) -> dict[str, Any]:
    """Make a log axis labeled at 1, 2 and 5 of each decade, or at 1 if it is long."""
    if min(values) <= 0:
        return {"rangemode": "tozero"}
    low, high = math.log10(min(values)), math.log10(max(values))
    steps = (1, 2, 5) if high - low < 1.7 else (1,)
    decades = range(math.floor(low) - 1, math.ceil(high) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    margin = 0.05 * (high - low) + 0.05
    return {
        "type": "log",
        "tickvals": ticks,
        "range": [low - margin, high + margin],
        "minor": {"ticks": ""},
    }


def curves(report: Report) -> Chart | None:
    """Draw the training loss by step, one line per layer."""
    found = [
        (layer, what, curve)
        for layer in report["layers"]
        for what, curve in layer.get("curves", {}).items()
        if curve
    ]
    if not found:
        return None
    kinds = list(dict.fromkeys(what for _, what, _ in found))
    data: list[dict[str, Any]] = []
    for i, (layer, what, curve) in enumerate(found):
        share = i / max(1, len(found) - 1)
        name = view.short(layer["layer"])
        name = name if len(kinds) == 1 else f"{name}, {what}"
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": list(range(1, len(curve) + 1)),
                "y": [float(f"{loss:.4g}") for loss in curve],
                "line": {"color": f"--ramp:{share:.3f}", "width": 1.5},
                "hovertemplate": f"layer {name}, step %{{x}}: %{{y:.5f}}"
                "<extra></extra>",
                "showlegend": len(found) <= 8,
            }
        )
    first, last = found[0], found[-1]
    return Chart(
        id="curves",
        title="Learning curves",
        says="Training loss per step on mini-batches, one line per layer"
        + (" (colors run from the first to the last)" if len(found) > 8 else "")
        + f". The first ends at {view.error(first[2][-1])}, the last at "
        f"{view.error(last[2][-1])}.",
        data=data,
        layout={
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": "loss"}, "tickformat": "~g"}
            | _log([y for trace in data for y in trace["y"]]),
            "legend": {"title": {"text": "layer"}},
        },
        header=["layer", "projections", "steps", "first", "lowest", "last"],
        rows=[
            [
                view.short(layer["layer"]),
                what,
                str(len(curve)),
                view.error(curve[0]),
                view.error(min(curve)),
                view.error(curve[-1]),
            ]
            for layer, what, curve in found
        ],
    )


def trade_off(report: Report) -> Chart | None:
    """Draw the loss over the size of what a plan could choose, and has chosen."""
    plan = report.get("plan")  # absent in reports of earlier versions
    if not plan:
        return None
    curve = plan["curve"]
    chosen = min(curve, key=lambda point: abs(point["size"] - plan["size"]))
    kinds = {
        "measured": ("pruned together", "--ours", "circle", "solid"),
        "predicted": ("added up, one by one", "--sparsegpt", "triangle-up-open", "dot"),
    }
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [point["size"] for point in curve],
            "y": [point[kind] for point in curve],
            "line": {"color": color, "dash": dash},
            "marker": {
                "color": color,
                "symbol": symbol,
                "size": [15 if point is chosen else 8 for point in curve],
            },
            "hovertemplate": "%{y:.4f}",
        }
        for kind, (name, color, symbol, dash) in kinds.items()
    ]
    return Chart(
        id="trade-off",
        title="Size against loss",
        says="KL divergence to the dense model in nats per token, before recovery, "
        "over the bytes of the weights, packed, relative to dense ones. The large mark "
        "is "
        f"what was chosen: size {plan['size']:.3f}, loss {chosen['measured']:.4f}.",
        data=data,
        layout={
            "xaxis": {"title": {"text": "size"}},
            "yaxis": {"title": {"text": "loss"}, "tickformat": "~g"}
            | _log([y for trace in data for y in trace["y"]]),
            "hovermode": "x unified",
        },
        header=["size", *(name for name, *_ in kinds.values())],
        rows=[
            [f"{point['size']:.4f}", *(f"{point[kind]:.5f}" for kind in kinds)]
            for point in curve
        ],
    )


def recovery(report: Report) -> Chart | None:
    """Draw each block's error before and after recovery."""
    found = [
        (view.short(layer["layer"]), values)
        for layer in report["layers"]
        for what, values in layer["errors"].items()
        if what == "block output" and len(values) > 1
    ]
    if not found:
        return None
    names = [name for name, _ in found]
    before, after = ([values[i] for _, values in found] for i in (0, -1))
    joined: dict[str, list[Any]] = {"x": [], "y": []}
    for name, values in found:
        joined["x"] += [name, name, None]
        joined["y"] += [values[0], values[-1], None]
    share = sum(after) / sum(before)

    def dots(name: str, y: list[float], color: str, symbol: str) -> dict[str, Any]:
        return {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": names,
            "y": y,
            "marker": {
                "color": color,
                "symbol": symbol,
                "size": 10 if len(found) < MANY else 6,
            },
            "hovertemplate": "%{y:.5f}",
        }

    lines = {
        "type": "scatter",
        "mode": "lines",
        **joined,
        "line": {"color": "--magnitude", "width": 2},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    data = [
        lines,
        dots("pruned", before, "--sparsegpt", "triangle-up-open"),
        dots("recovered", after, "--ours", "circle"),
    ]
    return Chart(
        id="recovery",
        title="Recovery of the blocks",
        says="Relative error of each decoder block's output, compared with the dense "
        f"block, before and after recovery; {share:.0%} of it remains.",
        data=data,
        layout={
            "xaxis": LAYERS,
            "yaxis": _relative([*before, *after]),
            "hovermode": "x unified",
        },
        header=["layer", "pruned", "recovered"],
        rows=[[n, view.error(v[0]), view.error(v[-1])] for n, v in found],
    )


def token_bytes(report: Report) -> Chart | None:
    """Draw the bytes that a token reads, by layer, for dense and sparse kernels."""
    by_place: dict[str, list[int]] = {}
    for layer in report["reading"]:
        where = view.place(layer["layer"])
        name = str(where[0]) if where else "output layer"
        sums = by_place.setdefault(name, [0, 0])
        sums[0] += layer["dense"]
        sums[1] += layer["sparse"]
    if not by_place:
        return None
    names = list(by_place)
    dense, sparse = view.token_bytes(report)

    def bars(label: str, index: int, color: str) -> dict[str, Any]:
        return {
            "type": "bar",
            "name": label,
            "x": names,
            "y": [sums[index] / 1e6 for sums in by_place.values()],
            "marker": {"color": color},
            "hovertemplate": "%{y:.3f} MB",
        }

    return Chart(
        id="reading",
        title="Bytes read per generated token",
        says=f"Each token reads {view.size(dense)} of weights with dense kernels and "
        f"{view.size(sparse)} with sparse ones. Decoding one sequence is memory-bound, "
        f"so the predicted speed-up is {dense / sparse:.2f} x. This is not a "
        "measurement.",
        data=[
            bars("dense kernels", 0, "--magnitude"),
            bars("sparse kernels", 1, "--ours"),
        ],
        layout={
            "barmode": "group",
            "bargap": 0.3,
            "xaxis": LAYERS,
            "yaxis": {"title": {"text": "MB"}, "rangemode": "tozero"},
            "hovermode": "x unified",
        },
        header=["layer", "dense", "sparse", "predicted speed-up"],
        rows=[
            [name, view.size(a), view.size(b), f"{a / b:.2f} x"]
            for name, (a, b) in by_place.items()
        ],
    )
