"""Cost against size: the fitted lines, the tables, the page and the plot, and the cases on the tiny shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.cases import scale
from bench.cases.scale_cases import LATENT, VALUES, cases, overrides
from bench.harness import pages, report, scale_report
from bench.harness.measure import Measurement, saved_bytes
from bench.harness.problem import Case, Problem, build, prepare
from bench.harness.results import Row, figures, read
from bench.harness.worlds import config
from tests.slow import slow_unless

PLAIN = Problem({}, "prfl", torch.float32)


def row(value: Any, milliseconds: Sequence[float], mebibytes: float, axis: str = "batch") -> Row:
    case = Case("scale", lambda: PLAIN, {"world": "tiny", "axis": axis, "value": value}, ("prfl",))
    size = int(mebibytes * 2**20)
    found = Measurement([each / 1000 for each in milliseconds], size, {"y": 0.0}, "prfl", {"peak": 2 * size})
    return Row(f"x[{case.name}-prfl]", figures(case, "prfl", PLAIN, found, found), Path())


def straight(start: float, slope: float, noise: float = 0.0, values: Sequence[int] = (1, 2, 4)) -> scale.Curve:
    drawn = np.random.default_rng(0).normal(0, noise, (len(values), 9))
    made = [row(v, start + slope * v + drawn[i], start + slope * v) for i, v in enumerate(values)]
    (curve,) = scale.curves(made[::-1])
    return curve


def test_a_straight_line_is_found() -> None:
    curve = straight(3.0, 2.0)
    assert curve.values == [1, 2, 4] and curve.axis.unit == "sample"  # sorted
    for cost, factor in (("time", 1.0), ("saved", 1.0), ("peak", 2.0)):
        line = scale.fit(curve, cost)
        assert line is not None and not line.flat
        assert [line.start, line.slope, line.explained] == pytest.approx([3 * factor, 2 * factor, 1], rel=1e-4)
    time, saved = scale.fit(curve, "time"), scale.fit(curve, "saved")
    assert time and saved and saved.interval is None
    assert time.interval and [time.interval.low, time.interval.high] == pytest.approx([2, 2], rel=1e-4)


def test_the_line_and_its_interval_are_those_of_the_rounds() -> None:
    curve = straight(30.0, 2.0, noise=1.0, values=(1, 3, 4, 9))
    line = scale.fit(curve, "time")
    assert line and line.interval and line.explained
    medians = [np.median(one.info["rounds_ms"]) for one in curve.rows]
    slope, start = np.polyfit([1, 3, 4, 9], medians, 1)
    assert [line.slope, line.start] == pytest.approx([slope, start], rel=1e-4)
    assert line.explained == pytest.approx(np.corrcoef([1, 3, 4, 9], medians)[0, 1] ** 2, rel=1e-4)
    draws = np.random.default_rng(1)
    again = [
        np.polyfit([1, 3, 4, 9], [np.median(draws.choice(one.info["rounds_ms"], 9)) for one in curve.rows], 1)[0]
        for _ in range(2000)
    ]
    low, high = np.quantile(again, [0.025, 0.975])
    width = high - low
    assert [line.interval.low, line.interval.high] == pytest.approx([low, high], abs=0.25 * width)


def test_what_is_flat_is_called_flat() -> None:
    for slope, flat in ((0.0, True), (0.1, True), (-0.1, True), (1.0, False), (-0.5, False)):
        line = scale.fit(straight(10.0, slope), "saved")
        assert line and line.flat == flat
        assert scale_report.cell(line).endswith("flat" if flat else "%") and line.straight
    assert scale_report.cell(scale.fit(straight(10.0, 0.0), "saved")) == "10 to 10: 0, flat"
    assert scale_report.cell(None) == "-"


def test_what_is_no_line_is_called_none() -> None:
    (bent,) = scale.curves([row(v, [y] * 3, y) for v, y in ((1, 1.0), (2, 9.0), (4, 8.0))])
    (two,) = scale.curves([row(v, [10.0 * v] * 3, 10.0 * v) for v in (1, 2)])
    lines = {name: scale.fit(curve, "time") for name, curve in (("bent", bent), ("two", two))}
    assert {name: line and scale_report.cell(line) for name, line in lines.items()} == {
        "bent": "1 to 8: no line", "two": "10 to 20: no line",
    }  # fmt: skip


def test_one_gradient_step_is_no_point_of_the_line() -> None:
    """Its edge is held; the line of 2, 3 and 4 goes through 10 K."""
    costs = {1: 35.0, 2: 20.0, 3: 30.0, 4: 40.0}
    (curve,) = scale.curves([row(v, [y] * 3, y, "gradients") for v, y in costs.items()])
    line = scale.fit(curve, "time")
    assert line and line.slope == pytest.approx(10) and line.costs == [35.0, 20.0, 30.0, 40.0]  # the plot has all
    assert line.interval and line.interval.low == pytest.approx(10)
    assert scale_report.title(curve).startswith("gradient steps 2 to 4")
    assert scale_report.cell(line) == "20 to 40: +10 [10, 10], 100 %"


def test_a_plot_that_disagrees_with_its_file_is_seen(file: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "README.md", tmp_path / "x.png"
    page.write_text("<!-- bench: scale.json axis=batch plot=x.png -->\n<!-- /bench -->\n")
    assert pages.update(page) and picture.read_bytes().startswith(b"\x89PNG")
    assert f"![{pages.ALT}](x.png)\n" in page.read_text()
    assert pages.stale(page) == [] and not pages.update(page)
    found = json.loads(file.read_text())
    for each in found["benchmarks"]:
        each["extra_info"]["saved_bytes"] *= 2
    file.write_text(json.dumps(found))
    assert pages.stale(page) == ["scale.json axis=batch plot=x.png"]
    assert pages.update(page) and pages.stale(page) == []


def test_a_resolution_is_an_area() -> None:
    assert scale.amount("32x48") == 1.536 and scale.amount(17) == 17
    (curve,) = scale.curves([row(v, [1.0], 1.0, "resolution") for v in ("480x832", "64x64", "240x416")])
    assert curve.values == ["64x64", "240x416", "480x832"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [row(v, [10.0 * v] * 3, v, axis) for axis in ("frames", "batch") for v in (1, 2, 5)]
    path = tmp_path / "scale.json"
    path.write_text(json.dumps({"benchmarks": [{"fullname": one.name, "extra_info": one.info} for one in rows]}))
    return path


@pytest.mark.slow
def test_the_report_says_what_a_unit_costs(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page, plot = tmp_path / "page.html", tmp_path / "plot.png"
    assert main(["report", str(file), "--page", str(page), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert "frames 1 to 5 (tiny, cpu), per frame" in text and "batch 1 to 5 (tiny, cpu), per sample" in text
    assert text.count("10 to 50: +10 [10, 10], 100 %") == text.count("1 to 5: +1, 100 %") == 2
    assert "95 % interval over rounds" in text and "times as fast" not in text

    html = page.read_text()
    assert html.count('src="data:image/png;base64,') == 1 and "<h2>cost against size</h2>" in html
    assert "<td>10 to 50: +10 [10, 10], 100 %</td>" in html
    assert not re.search(r"(src|href)=(?!\"data:)", html) and "http" not in html
    assert plot.read_bytes().startswith(b"\x89PNG")

    assert main(["report", str(file), "--markdown"]) == 0
    tables = capsys.readouterr().out.split("frames 1 to 5 (tiny, cpu), per frame:\n")
    assert len(tables) == 2 and "| prfl | 10 to 50: +10" in tables[1]


def test_one_value_alone_is_a_row_like_any_other(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = read([file])[:1]
    assert scale.curves(rows) == [] and "scale-tiny-frames-value1" in report.terminal(rows)
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps({"benchmarks": [{"fullname": rows[0].name, "extra_info": rows[0].info}]}))
    assert main(["report", str(alone), "--plot", str(tmp_path / "x.png")]) == 2
    assert "costs against size of 0 machines" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


# ------------------------------------------------------------------------------------------------------------ the cases


def test_gradient_steps_are_vaders() -> None:
    named = {}
    for case in cases("tiny"):
        named[case.settings["axis"]] = build(case).names[LATENT]
    assert {name for axis, name in named.items() if axis != "gradients"} == {"PRFL, latent reward"}
    assert named["gradients"] == "VADER, latent reward"


@pytest.mark.parametrize("axis", VALUES["tiny"])
def test_each_axis_changes_its_own_setting_alone(axis: str) -> None:
    few, many = (config("tiny", overrides("tiny", axis, VALUES["tiny"][axis][i])) for i in (0, -1))
    sizes = [
        {
            "frames": one.data.frames, "resolution": one.data.height * one.data.width,
            "steps": one.rollout.steps, "batch": one.training.batch,
        }
        for one in (few, many)
    ]  # fmt: skip
    assert [name for name in sizes[0] if sizes[0][name] < sizes[1][name]] == ([axis] if axis != "gradients" else [])
    assert all(sizes[0][name] == sizes[1][name] for name in sizes[0] if name != axis)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis, grows",
    slow_unless(
        lambda case: case[0] in ("steps", "frames"),
        [("steps", 1.0), ("gradients", 1.0), ("batch", 3.6), ("frames", 2.0)],
    ),
)
def test_what_prfl_keeps_is_flat_in_the_chain_and_grows_with_the_video(axis: str, grows: float) -> None:
    own = [case for case in cases("tiny") if case.settings["axis"] == axis]
    if axis == "gradients":
        own = own[1:]  # the one edge of K = 1 is held while the reward is scored, and keeps a little more
    first, last = (saved_bytes(prepare(build(case), LATENT)) for case in (own[0], own[-1]))
    assert last / first == pytest.approx(grows, rel=0.1)
