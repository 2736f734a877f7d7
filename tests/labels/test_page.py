"""The page: its pairs are rows of a manifest, its script runs (in node), and what it saves ``read_manifest`` reads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import prfl.labels.page as page_module
from prfl.data.manifest import LabelledVideo, PreferencePair, read_manifest
from prfl.data.video import write_video
from prfl.labels.page import page_pairs, write_page
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize

SCRIPT = Path(page_module.__file__).with_name("page.js")
CLIP = VideoSize(5, 16, 16, 8.0)
HOSTILE = "a </script><script>alert(1)</script> dog & <b>cat</b> {{SCRIPT}} {{CONTENT}} \x1b[31m"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="the script of the page runs in node")


@pytest.fixture
def rows(tmp_path: Path) -> list[LabelledVideo]:
    """Three videos of one prompt and two of another, in a split each."""
    made = []
    for prompt, count, split in (("a red circle", 3, "train"), (HOSTILE, 2, "validation")):
        for index in range(count):
            file = tmp_path / "videos" / f"{split}-{index}.mp4"
            write_video(file, torch.rand(3, 5, 16, 16) * 2 - 1, 8)
            made.append(LabelledVideo(file, prompt, {}, split))
    return made


def content(page: Path) -> dict:
    found = re.search(r'<script id="content" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def node(code: str) -> str:
    whole = f"const page = require({json.dumps(str(SCRIPT))});\n{code}"
    run = subprocess.run(["node", "-e", whole], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_every_two_videos_of_a_prompt_once_and_always_the_same(rows: list[LabelledVideo], tmp_path: Path) -> None:
    pairs = page_pairs(tmp_path, rows)
    assert [pair["prompt"] for pair in pairs] == ["a red circle"] * 3 + [HOSTILE]
    assert len({frozenset((pair["a"], pair["b"])) for pair in pairs}) == 4
    assert all(pair in pairs for pair in page_pairs(tmp_path, rows[:2])), "an answer stays with its pair"


def test_no_side_is_first_more_often(tmp_path: Path) -> None:
    rows = [LabelledVideo(tmp_path / f"{i}-{j}.mp4", str(i), {}) for i in range(200) for j in range(2)]
    first = sum(pair["a"].endswith("-0.mp4") for pair in page_pairs(tmp_path, rows))
    assert 70 < first < 130


def test_the_page_holds_everything_and_loads_nothing(rows: list[LabelledVideo], tmp_path: Path) -> None:
    page = write_page(tmp_path / "label.html", rows, ["motion", "text"], CLIP)
    text = page.read_text()
    assert not re.search(r"https?://|src=[\"']|@import|url\(", text)
    assert len(re.findall(r"\{\{", text)) == 2, "those of a prompt, which is no template"
    assert "\x1b" not in text and content(page)["pairs"][-1]["prompt"] == HOSTILE
    held = content(page)
    assert held["dimensions"] == ["motion", "text"] and len(held["pairs"]) == 4 and len(held["videos"]) == 5
    assert text.count("</script>") == 2, "a prompt cannot end a script"
    with pytest.raises(PrflError, match="no prompt has two videos"):
        write_page(tmp_path / "label.html", rows[:1], ["motion"], CLIP)


@needs_node
def test_what_the_page_saves_is_our_manifest(rows: list[LabelledVideo], tmp_path: Path) -> None:
    held = content(write_page(tmp_path / "label.html", rows, ["motion", "text"], CLIP))
    text = node(
        f"""const pairs = {json.dumps(held["pairs"])};
        let answers = {{}};
        answers = page.withAnswer(answers, pairs[0], "motion", "b");
        answers = page.withAnswer(answers, pairs[0], "motion", "a");
        answers = page.withAnswer(answers, pairs[0], "text", "tie");
        answers = page.withAnswer(answers, pairs[3], "text", "b");
        process.stdout.write(page.manifest(answers, pairs));"""
    )
    saved = tmp_path / "preferences.jsonl"
    saved.write_text(text)
    sides = [[(tmp_path / pair[side]).resolve() for side in "ab"] for pair in held["pairs"]]
    assert read_manifest(saved) == [
        PreferencePair("a red circle", *sides[0], {"motion": "a", "text": "tie"}, "train"),
        PreferencePair(HOSTILE, *sides[3], {"text": "b"}, "validation"),
    ]


@needs_node
def test_the_way_through_the_pairs() -> None:
    """What is open comes next, around the end; an old visit's answers are taken up, and only what is valid of them."""
    out = node(
        """const pairs = [1, 2, 3].map((i) => ({ prompt: "p", a: `a${i}`, b: `b${i}` }));
        const asked = ["motion", "text"];
        let answers = page.withAnswer({}, pairs[1], "motion", "a");
        const steps = [page.nextOpen(answers, pairs, asked, 0), page.firstOpen(answers, pairs[1], asked)];
        answers = page.withAnswer(answers, pairs[1], "text", "b");
        steps.push(page.nextOpen(answers, pairs, asked, 0), page.nextOpen(answers, pairs, asked, 2));
        for (const pair of pairs) for (const one of asked) answers = page.withAnswer(answers, pair, one, "tie");
        steps.push(page.nextOpen(answers, pairs, asked, 2));
        const stored = JSON.stringify({ "a1 b1": { motion: "a", text: "left", speed: "b" }, "x y": { motion: "a" } });
        const back = [stored, "{broken", null, "null", "3"].map((text) => page.restored(text, pairs, asked));
        console.log(JSON.stringify({ steps, back, keys: page.KEYS }));"""
    )
    told = json.loads(out)
    assert told["steps"] == [1, 1, 2, 0, -1]
    assert told["back"] == [{"a1 b1": {"motion": "a"}}, {}, {}, {}, {}]
    assert set(told["keys"].values()) == {"a", "b", "tie"}
