"""Render report.html, one self-contained file that works offline, light or dark."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llmc_attnmask.report import charts, maps, view
from llmc_attnmask.report.heads import heads
from llmc_attnmask.report.numbers import missing
from llmc_attnmask.report.tiles import tiles

Report = Mapping[str, Any]


@cache
def environment() -> Environment:
    """Return the templates' environment, which escapes names and recipes."""
    found = Environment(
        loader=PackageLoader("llmc_attnmask.report"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["view"] = view
    return found


def render(report: Report) -> str:
    """Render the page of a report, which is about as large as Plotly (5 MB)."""
    sections = {
        "plan": [charts.trade_off(report)],
        "error": [charts.errors(report, kind) for kind in ("matrix", "output")],
        "learning": [charts.curves(report), charts.recovery(report)],
        "zeros": [maps.zeros_by_projection(report), maps.zeros_by_head(report)],
        "size": [charts.token_bytes(report)],
    }
    present = {name: [f for f in found if f] for name, found in sections.items()}
    drawn = [chart for found in present.values() for chart in found]
    matrices = heads(report)
    return (
        environment()
        .get_template("page.html")
        .render(
            report=report,
            title=_title(report),
            tiles=tiles(report),
            sections=present,
            heads=matrices,
            missing=missing(report),
            masks=view.masks(report),
            figures_json=_script_json(
                {f.id: {"data": f.data, "layout": f.layout} for f in drawn}
            ),
            heads_json=_script_json([asdict(head) for head in matrices]),
            style=Markup(_own("style.css")),
            script=Markup(_own("page.js")),
            plotly=Markup(_plotly()),
        )
    )


def _title(report: Report) -> str:
    base = report["base_model"]
    return base.rstrip("/").rpartition("/")[2] if base else "checkpoint"


def _script_json(value: Any) -> Markup:
    """Write JSON in which no name can end the script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _own(name: str) -> str:
    path = files("llmc_attnmask.report") / "templates" / name
    return path.read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    try:
        package = files("plotly")
    except ModuleNotFoundError:
        raise ImportError(
            'the page needs plotly: pip install "llmc-attnmask[compress]"'
        ) from None
    path = package / "package_data" / "plotly.min.js"
    return path.read_text(encoding="utf-8")
