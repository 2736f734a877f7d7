"""Text of a user is text wherever it is shown: on the console, in tables, plots, pages and cards."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.table import Table

from prfl.data.sources import listed
from prfl.evaluation import plots
from prfl.evaluation.metrics import Interval
from prfl.evaluation.reward_eval import MEASURES, Level, Row
from prfl.evaluation.tables import ranking_tables
from prfl.reward.model_card import table
from prfl.utils.console import PlainConsole
from prfl.utils.errors import PrflError
from prfl.utils.text import html_text, visible

HOSTILE = [
    "quality [/10]",
    "[bold]look",
    ":smile:",
    "a\x1b[31mred\x07",
    "turned \u202eover",
    r"$\frac{$",
    "_low",
    "a|b\nc",
]


def printed(*shown: object) -> str:
    text = io.StringIO()
    console = PlainConsole(file=text, width=140, force_terminal=True, color_system=None)
    for each in shown:
        console.print(each)
    return text.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_printed_as_it_is(name: str) -> None:
    rows = [Row(name, name, Level("point", 0.0, 0.0), Interval(0.5, 0.4, 0.6), None, None, None, None, None, 1, 0)]
    other = Table(name, title=name)
    other.add_row(name)
    whole = visible(name)
    assert whole.splitlines()[0] in printed(name)
    for shown in (*ranking_tables(rows, MEASURES["accuracy"]).values(), other):
        text = printed(shown)
        assert all(part in text for part in whole.splitlines())
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert plots.by_sigma(rows, [name], MEASURES["accuracy"])[:4] == b"\x89PNG"
    assert plots.curve([{"step": 1, name: 1.0}], name)[:4] == b"\x89PNG"


def test_what_cannot_be_seen_is_written_out() -> None:
    assert visible("é 日本 \t\n 🙂") == "é 日本 \t\n 🙂"
    assert visible("a\x1b[2J\r\x00\ud800\x9b") == r"a\x1b[2J\r\x00\ud800\x9b"
    assert html_text("<b>\x1b & '") == r"&lt;b&gt;\x1b &amp; &#x27;"
    assert listed("hidden", [Path("clips/a\x1b[31m\udce9.mp4")]) == r"1 hidden (a\x1b[31m\udce9.mp4)"
    assert str(PrflError("no \x1b[31mfile", where="a\rb", fix="x")) == "a\\rb: no \\x1b[31mfile\n  To mend it: x"


def test_a_cell_of_a_card_is_one_cell() -> None:
    assert table(("name",), [("a|b\nc <script>",)]).splitlines()[2] == r"| a\|b c &lt;script> |"


PATH = "runs/a-folder-with-a-long-name/checkpoints/step-000100/weights.safetensors"
SENTENCE = f"{PATH}: it was trained with rank two, and the config says four\n  To mend it: put it back, or train again"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_breaks_lines_between_words(width: int) -> None:
    """And cuts none: a path can be copied from the screen."""
    text = io.StringIO()
    PlainConsole(file=text, width=width, force_terminal=True, color_system=None).say(SENTENCE)
    lines = text.getvalue().splitlines()
    assert text.getvalue().split() == SENTENCE.split() and any(PATH in line for line in lines)
    assert all(len(line) <= width for line in lines if PATH not in line)
    assert sum(line.startswith("  To mend it: ") for line in lines) == 1
    assert len(lines) == 2 if width == 200 else all(line.startswith("    ") for line in lines[1:-1])


def test_a_file_has_every_line_whole_and_a_warning_once() -> None:
    text = io.StringIO()
    console = PlainConsole(file=text, width=60)
    console.say(SENTENCE)
    console.warn("a long warning " * 20)
    console.warn("a long warning " * 20)
    assert text.getvalue() == f"{SENTENCE}\nwarning: {'a long warning ' * 20}\n"
