import json
from dataclasses import asdict

from integration.benchmarks import trade_off
from integration.benchmarks.methods import METHODS, recipe_of
from integration.benchmarks.trade_off import DENSE, Point, points
from llmc_attnmask.oneshot.shipped import recipes


def row(point: Point, perplexity: float, size: float, plan: dict | None = None) -> dict:
    run = {"perplexity": perplexity, "seconds": 1.0, "plan": plan}
    return {**asdict(point), "name": point.name, "size": size, "runs": [run]}


def by_name(name: str) -> Point:
    return next(point for point in points() if point.name == name)


ROWS = [
    row(DENSE, 20.0, 1.0),
    row(by_name("SparseGPT 2:4"), 30.0, 0.5625),
    row(by_name("block_2of4 2:4"), 22.5, 0.5625),
    row(
        by_name("block_2of4, dense_share 0.25 2:4"),
        21.0,
        0.671,
        {"size": 0.671, "expected_rise": 0.06},
    ),
]


def test_the_table_compares_rises_with_sparsegpts_and_with_what_was_expected():
    lines = trade_off.markdown(reversed(ROWS)).splitlines()
    assert lines[2] == "| dense | | 1 | 20.000 | | | |"
    assert lines[3].startswith("| SparseGPT, 2:4 | SparseGPT | 0.562 | 30.000 | +50.0%")
    assert lines[4].endswith("| block_2of4 | 0.562 | 22.500 | +12.5% | 0.250 |  |")
    assert lines[5].endswith("0.671 | 21.000 | +5.0% | 0.100 | +6.0% |")


def test_of_several_seeds_the_table_has_the_mean_and_the_range():
    several = dict(ROWS[2])
    several["runs"] = [
        {**several["runs"][0], "perplexity": p} for p in (22.0, 22.5, 24)
    ]
    lines = trade_off.markdown([*ROWS[:2], several]).splitlines()
    assert "| 22.833 | +14.2% | 0.283 (0.200 to 0.400) |" in lines[4]


def test_the_picture_is_the_same_for_the_same_rows():
    first = trade_off.drawn(ROWS)
    assert first == trade_off.drawn(ROWS) != trade_off.drawn(ROWS[:3])
    assert first.startswith(b"<?xml")


def test_every_point_is_a_known_method_and_has_a_size_or_a_plan():
    names = [point.name for point in points()]
    assert len(set(names)) == len(names)
    for point in points():
        recipe, kind, _ = recipe_of(point.method)
        assert point.method in METHODS or recipe in recipes()
        assert (point.size is None) == (bool(kind))


def test_an_interrupted_run_keeps_rows_of_points_that_are_left(tmp_path, monkeypatch):
    old = {**ROWS[1], "name": "a method that is gone"}
    (tmp_path / trade_off.FILE).write_text(json.dumps([old, ROWS[0], ROWS[2]]))
    monkeypatch.setattr(trade_off, "measured", lambda _: iter(ROWS[:2]))
    monkeypatch.setattr("sys.argv", ["", "--model", "x", "--out", str(tmp_path)])
    trade_off.main()
    names = [row["name"] for row in trade_off.read(tmp_path / trade_off.FILE)]
    assert names == [row["name"] for row in ROWS[:3]]
