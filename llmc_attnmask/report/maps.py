"""Maps of the zeros: a row per layer, a column per projection or head."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmc_attnmask.report import view
from llmc_attnmask.report.charts import LAYERS, MANY, Chart

Report = Mapping[str, Any]

_MOST_CELLS_WITH_TEXT = 160


def zeros_by_projection(report: Report) -> Chart | None:
    """Map the share of zeros in the files, by layer and Linear."""
    sums: dict[tuple[int, str], list[float]] = {}
    for layer in report["checkpoint"]:
        where = view.place(layer["name"])
        if where and layer["sparsity"] is not None:
            number, name = where
            sums.setdefault((number, name.rpartition(".")[2]), []).append(
                layer["sparsity"]
            )
    cells = {key: sum(values) / len(values) for key, values in sums.items()}
    if not cells:
        return None
    return _map(
        "zeros-projection",
        "Zeros by projection",
        cells,
        _in_order([name for _, name in cells]),
        "Share of zeros in each Linear, as stored in the files",
    )


def zeros_by_head(report: Report) -> Chart | None:
    """Map the share of pruned entries, by layer and head."""
    cells: dict[tuple[int, str], float] = {}
    for i, layer in enumerate(report["layers"]):
        where = view.place(layer["layer"])
        for role, shares in layer.get("zeros_by_head", {}).items():
            for head, share in enumerate(shares):
                cells[where[0] if where else i, f"{role}{head}"] = share
    if not cells:
        return None
    columns = sorted(
        {name for _, name in cells}, key=lambda n: ("qkvo".index(n[0]), int(n[1:]))
    )
    return _map(
        "zeros-head",
        "Pruned entries by head",
        cells,
        columns,
        "Share of entries that the learned masks prune in each head of a projection",
    )


def _in_order(names: Sequence[str]) -> list[str]:
    """Sort names of Linears as a decoder runs through them, attention first."""
    known = ["q", "k", "v", "o", "qkv", "gate", "up", "gate_up", "down"]
    rank = {f"{name}_proj": i for i, name in enumerate(known)}
    return sorted(dict.fromkeys(names), key=lambda n: (rank.get(n, len(rank)), n))


def _map(
    id_: str,
    title: str,
    cells: Mapping[tuple[int, str], float],
    columns: list[str],
    what: str,
) -> Chart:
    numbers = sorted({number for number, _ in cells})
    values = [[cells.get((n, c)) for c in columns] for n in numbers]
    low, high = min(cells.values()), max(cells.values())
    # a narrow span is stretched, so that cells do not all look alike
    shown = (low, high) if 0.005 < high - low < 0.3 else (0, 1)
    gap = 2 if max(len(numbers), len(columns)) < MANY else 0
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": [column.removesuffix("_proj") for column in columns],
        "y": [str(number) for number in numbers],
        "z": values,
        "zmin": shown[0],
        "zmax": shown[1],
        "xgap": gap,
        "ygap": gap,
        "colorscale": [[0, "--map-low"], [1, "--map-high"]],
        "colorbar": {
            "tickformat": ".0%" if shown == (0, 1) else ".1%",
            "thickness": 12,
            "outlinewidth": 0,
            "nticks": 5,
            "lenmode": "pixels",
            "len": 110,
            "y": 1,
            "yanchor": "top",
        },
        "hovertemplate": "layer %{y}, %{x}: %{z:.1%}<extra></extra>",
    }
    if len(cells) <= _MOST_CELLS_WITH_TEXT and len(columns) <= 12:
        trace |= {"texttemplate": "%{z:.0%}", "textfont": {"size": 11}}
    span = f"{low:.1%}" if high - low < 5e-4 else f"{low:.1%} to {high:.1%}"
    return Chart(
        id=id_,
        title=title,
        says=f"{what}: {span}.",
        data=[trace],
        layout={
            "xaxis": {
                "type": "category",
                "side": "top",
                "showgrid": False,
                "tickangle": 0,
                "nticks": 12 if len(columns) < MANY else 6,
            },
            "yaxis": LAYERS | {"autorange": "reversed", "showgrid": False},
        },
        header=["layer", *columns],
        rows=[
            [str(n), *("" if v is None else f"{v:.1%}" for v in row)]
            for n, row in zip(numbers, values, strict=True)
        ],
        height=110 + min(26 * len(numbers), 430),
    )
