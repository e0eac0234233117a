"""report.html loads nothing, leaves nothing unescaped, and draws its charts."""

import base64
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import plotly.graph_objects
import pytest

from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.report import charts, maps, page
from llmc_attnmask.report.heads import heads
from llmc_attnmask.report.numbers import of_folder, reduced

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "<script>alert(1)</script>\"'&"


class Outline(HTMLParser):
    """Elements of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def outline(report: dict) -> Outline:
    found = Outline()
    found.feed(page.render(report))
    return found


def test_the_page_needs_nothing_from_outside(report):
    found = outline(report)
    assert not [s for s in found.all("script") if "src" in s]
    links = [link["href"] for link in found.all("link")]
    assert links == ["data:,"]  # not even an icon is requested
    assert not found.all("img") and not found.all("iframe")
    styles = page.render(report).split("<style>")[1].split("</style>")[0]
    assert "url(" not in styles and "@import" not in styles


def test_the_page_has_the_basics_for_keyboards_and_screen_readers(report):
    found = outline(report)
    assert found.all("html")[0]["lang"] == "en"
    assert found.all("main") and found.all("header") and len(found.all("h1")) == 1
    levels = [int(t[1]) for t, _ in found.elements if re.fullmatch("h[1-6]", t)]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = [a["id"] for _, a in found.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    named = [a["aria-labelledby"] for _, a in found.elements if "aria-labelledby" in a]
    assert set(named) <= set(ids)
    charts = [a for a in found.all("div") if "chart" in str(a.get("class"))]
    assert len(charts) >= 9
    assert all(a["role"] == "img" and a["aria-label"] for a in charts)
    assert found.all("label")[0]["for"] == found.all("select")[0]["id"]


def test_names_and_recipes_cannot_break_out(report):
    for layer in report["layers"]:
        layer["layer"] = EVIL
    for layer in report["checkpoint"]:
        layer["name"] = f"model.layers.0.{EVIL}"
    report["recipe"] = f"# {EVIL}"
    report["base_model"] = EVIL
    report["warnings"] = [EVIL]
    report["options"] = {EVIL: EVIL}
    html = page.render(report)
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert(1)") > 3
    assert len(outline(report).all("script")) == 5  # its own


def test_plotly_accepts_the_charts(report):
    drawn = [
        charts.errors(report, "matrix"),
        charts.errors(report, "output"),
        charts.curves(report),
        charts.recovery(report),
        maps.zeros_by_projection(report),
        maps.zeros_by_head(report),
        charts.token_bytes(report),
    ]
    for chart in drawn:
        assert chart is not None and chart.says and chart.rows
        assert all(len(row) == len(chart.header) for row in chart.rows)
        text = json.dumps([chart.data, chart.layout])
        data, layout = json.loads(re.sub(r'"--[a-z0-9:.-]+"', '"#123456"', text))
        plotly.graph_objects.Figure(data, layout)  # raises for anything unknown


def test_the_tables_show_the_reports_numbers(report):
    chart = charts.errors(report, "matrix")
    assert chart is not None
    compared = report["layers"][0]["compared"]
    row = dict(zip(chart.header, chart.rows[0], strict=True))
    assert row["This run"] == f"{compared['ours']['matrix']:.5f}"
    assert row["SparseGPT"] == f"{compared['SparseGPT']['matrix']:.5f}"


def test_heads_are_stored_as_bytes_in_order_of_decreasing_error(report):
    found = heads(report)
    errors = [float(head.label.rpartition(" ")[2]) for head in found]
    assert len(found) == 8 and errors == sorted(errors, reverse=True)
    for head in found:
        assert len(base64.b64decode(head.dense)) == head.tokens**2
        assert f"{head.largest:.3f}" in head.says


def test_a_checkpoint_of_another_origin_has_a_page_that_says_what_is_missing():
    html = page.render(reduced() | of_folder(MODEL_DIR))
    assert "Not in this report" in html and "report.json of the run" in html
    assert "Zeros by projection" in html and "Attention error by layer" not in html


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to render the page")
@pytest.mark.parametrize("kind", ["full", "reduced"])
def test_chromium_draws_every_chart_without_a_complaint(kind, report, tmp_path):
    report = report if kind == "full" else reduced() | of_folder(MODEL_DIR)
    path = tmp_path / "report.html"
    path.write_text(page.render(report), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,4000"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints
    charts = len(re.findall(r'<div class="chart', path.read_text(encoding="utf-8")))
    drawn = len(re.findall(r'class="[^"]*\bjs-plotly-plot\b', done.stdout))
    assert drawn == charts == (10 if kind == "full" else 2)
