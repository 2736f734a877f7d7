"""Tables, the page and comparisons of result files, and READMEs that show what the files say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.__main__ import main
from bench.harness import pages, plots, report
from bench.harness.results import read
from prfl.utils.errors import PrflError

REPOSITORY = Path(__file__).parents[2]
PAGES = [path for folder in (".", "docs", "bench", "kernels") for path in sorted((REPOSITORY / folder).glob("*.md"))]
FAST, SLOW = [1.0e-3, 1.1e-3, 0.9e-3], [2.0e-3, 2.2e-3, 1.8e-3]
Results = Callable[..., Path]


def test_tables_say_what_the_file_says(results: Results, capsys: pytest.CaptureFixture) -> None:
    file = results("a.json", plain=SLOW, other=FAST, saved={"other": 3 * 2**20})
    text = report.terminal(read([file]))
    assert re.search(r"plain\s+│\s+1 │\s+2 \(1.88 to 2.12\)", text)
    assert re.search(r"other\s+│\s+2.000 \[1.9\d\d, 2.0\d\d\]|other\s+│\s+2.000 \[2.000, 2.000\]", text)
    assert "TFLOPS" not in text and "saved MiB" in text  # a column that says nothing is not shown
    assert "adding-width64 (float32; x 64)" in text and "weights: random" in text
    assert main(["report", str(file), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["adding-width64:", ""] and lines[2].startswith("| provider | times as fast |")
    assert lines[5].startswith("| other | ") and max(map(len, lines[2:6])) <= 100


PARTS = {part: 1e-4 for part in report.PARTS}
STEP = {"parts": PARTS, "facts": {report.EVALUATIONS: 9.0, report.GRADIENTS: 1.0}}


def test_a_gradient_of_several_has_its_own_cost(results: Results) -> None:
    several = {**STEP, "facts": {**STEP["facts"], report.GRADIENTS: 4.0}}
    for more, found in (({"plain": STEP, "other": several}, ["2", "0.25"]), ({"plain": STEP, "other": STEP}, [])):
        text = report.markdown(read([results("a.json", plain=SLOW, other=FAST, more=more)]))
        tables = [table.splitlines() for table in text.split("\n\n") if table.startswith("|")]
        head, *rows = [sum((table[i].strip("| ").split(" | ") for table in tables), []) for i in (0, 2, 3)]
        assert (report.PER_GRADIENT in head) == bool(found)  # of one each it is the step's
        assert [row[head.index(report.PER_GRADIENT)] for row in rows] == found if found else True


def test_rounds_and_what_is_lacking_are_said(results: Results) -> None:
    more = {"other": {"lacks": {"memory": "its process ended with -9"}}}
    rows = read([results("a.json", plain=SLOW, other=FAST, more=more)])
    text = report.terminal(rows)
    assert "adding-width64, other: no memory: its process ended with -9" in text
    assert re.search(r"ms \(20 to 80 %\) ┃ rounds ", text) and re.search(r"1.06\) │\s+3 │", text)


@pytest.mark.parametrize("width", [60, 100, 140])
def test_nothing_is_lost_on_a_narrow_terminal(results: Results, width: int) -> None:
    rows = read([results("a.json", plain=SLOW, other=FAST, more={"plain": STEP, "other": STEP})])
    text = report.terminal(rows, width)
    tables = text[: text.rindex("┘")]
    assert max(map(len, tables.splitlines())) <= width and "…" not in text
    whole = [line for line in text.splitlines() if line.startswith("┃")]
    for i in report.used(rows):
        assert any(report.HEAD[i] in line for line in whole), report.HEAD[i]
    parts = [line for line in whole if "ms ┃" in line]
    assert len(parts) == 1 or width == 60  # a step's parts stay together
    assert text.count("│ other ") == len(whole)


def test_the_headline_comes_first_on_a_page(results: Results, tmp_path: Path) -> None:
    rows = read([results("a.json", plain=SLOW, other=FAST)])
    names = ("lora_linear", "methods", "same_step", "adding")
    some = [replace(row, info={**row.info, "operation": name, "case": name}) for name in names for row in rows]
    page = report.write_page(some, tmp_path / "page.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["same_step", "methods", "lora_linear", "adding"]


def axes_of(draw: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Axes:
    """What a plot has drawn, before it is a picture."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or b"")
    draw()
    return figures[0].axes[0]


def test_axes_have_names_and_units(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    peak, saved = {"plain": 2**20, "other": 3 * 2**20}, {"plain": 2**21, "other": 2**20}
    rows = read([results("a.json", plain=SLOW, other=FAST, peak=peak, saved=saved)])
    times = axes_of(lambda: plots.ratios(rows), monkeypatch)
    assert times.get_xlabel() == "times as fast as plain (logarithmic)"
    assert [label.get_text() for label in times.get_yticklabels()] == ["other", "plain"]
    memory = axes_of(lambda: plots.memory(rows), monkeypatch)
    assert memory.get_xlabel() == "memory, MiB"
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in memory.containers}
    assert widths == {"peak": [1.0, 3.0], "saved for backward": [2.0, 1.0]}
    alone = read([results("b.json", plain=SLOW, other=FAST, peak=peak)])
    alone = [replace(row, info={**row.info, "saved_bytes": None}) for row in alone]
    assert axes_of(lambda: plots.memory(alone), monkeypatch).get_xlabel() == "peak, MiB"
    nothing = [replace(row, info={**row.info, "saved_bytes": None, "memory": {}}) for row in alone]
    assert plots.memory(nothing) is None


def test_a_page_that_stands_alone(results: Results, tmp_path: Path) -> None:
    file = results("a.json", plain=SLOW, other=FAST)
    assert main(["report", str(file), "--page", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 2, "time and memory"
    assert "<th scope=row>other</th>" in page and "over rounds" in page
    assert not re.search(r"(src|href)=(?!\"data:)", page)


def test_what_became_slower_or_larger(results: Results, capsys: pytest.CaptureFixture) -> None:
    before = results("a.json", plain=FAST, other=SLOW, ceiling=FAST, saved={"other": 1000}, peak={"other": 2**20})
    after = results("b.json", plain=SLOW, other=SLOW, new=FAST, saved={"other": 1001}, peak={"other": 2**21})
    assert main(["compare", str(before), str(after)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ("plain", "other", "new", "ceiling")
    found = {name: next(line for line in lines if f", {name} " in line) for name in names}

    assert "slower" in found["plain"] and "2.000 [" in found["plain"]
    assert "slower" not in found["other"] and "larger peak, saves more" in found["other"]
    assert "1000 -> 1001" in found["other"] and "1 -> 2" in found["other"]
    assert " new " in found["new"] and " gone " in found["ceiling"]
    assert "1024 " in found["plain"] and "->" not in found["plain"].split("│")[-2]


def test_refusals(results: Results, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.json").write_text("[]")
    for path in ("absent.json", "x.json"):
        with pytest.raises(PrflError, match="no results of pytest-benchmark"):
            read([tmp_path / path])
    assert main(["report"]) == 2 and "no files" in capsys.readouterr().err


@pytest.fixture
def page(results: Results, tmp_path: Path) -> Path:
    results("a.json", plain=SLOW, other=FAST)
    path = tmp_path / "README.md"
    path.write_text("Before.\n<!-- bench: a.json provider=other -->\n<!-- /bench -->\nAfter.\n")
    return path


def test_a_pages_table_is_written_from_its_files(page: Path, capsys: pytest.CaptureFixture) -> None:
    assert pages.stale(page) == ["a.json provider=other"]
    assert main(["report", "--update", str(page)]) == 0 and "updated" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("Before.\n<!-- bench") and text.endswith("<!-- /bench -->\nAfter.\n")
    assert "| other |" in text and "| plain |" not in text
    assert pages.stale(page) == [] and not pages.update(page)


@pytest.mark.parametrize("planted", ["table", "file"])
def test_a_table_that_disagrees_with_its_file_is_seen(page: Path, results: Results, planted: str) -> None:
    pages.update(page)
    if planted == "table":
        page.write_text(page.read_text().replace("2.000 [", "3.000 [", 1))
    else:
        results("a.json", plain=SLOW, other=SLOW)
    assert pages.stale(page) == ["a.json provider=other"]


def test_a_marker_without_rows_is_an_error(page: Path) -> None:
    page.write_text(page.read_text().replace("provider=other", "provider=nobody"))
    with pytest.raises(PrflError, match="no rows for"):
        pages.stale(page)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_our_pages_show_what_their_files_say(path: Path) -> None:
    """To mend it: python -m bench report --update PAGE"""
    assert pages.stale(path) == []
