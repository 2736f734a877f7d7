"""The page: what it holds, its script (run in node), and what it saves ``read_manifest`` reads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import prfl.labels.page as page_module
from prfl import cli
from prfl.data.manifest import PreferencePair, read_manifest
from prfl.data.video import read_video, write_video
from prfl.evaluation.media import browser_mp4
from prfl.labels.asking import asked_of
from prfl.labels.playable import facts_of
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize

SCRIPT = Path(page_module.__file__).with_name("answers.js")
HOSTILE = "a </script><script>alert(1)</script> dog & <b>cat</b> {{SCRIPT}} {{CONTENT}} \x1b[31m"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="the script of the page runs in node")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of one prompt and two of another, one of which no browser plays, each with its prompt beside it."""
    folder = tmp_path_factory.mktemp("clips")
    for name, prompt in (("a", "a red circle"), ("b", "a red circle"), ("c", "a red circle"), ("d", HOSTILE)):
        (folder / f"{name} 1.mp4").write_bytes(browser_mp4(torch.rand(3, 5, 16, 16) * 2 - 1, 8.0))
        (folder / f"{name} 1.txt").write_text(prompt)
    write_video(folder / "e.gif", torch.linspace(-1, 1, 5)[:, None, None].expand(3, 5, 16, 16), 8)
    (folder / "e.txt").write_text(HOSTILE)
    return folder


def content(page: Path) -> dict:
    found = re.search(r'<script id="content" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def node(code: str) -> str:
    whole = f"const page = require({json.dumps(str(SCRIPT))});\n{code}"
    run = subprocess.run(["node", "-e", whole], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_page_links_the_videos_and_loads_nothing_else(videos: Path, capsys: pytest.CaptureFixture) -> None:
    asked = ["--dimensions", "text", "--dimensions", "motion=Which moves better, and why?"]
    assert cli.main(["labels", "page", str(videos), *asked]) == 0, capsys.readouterr().err
    assert "4 pairs of 5 videos and 2 prompts" in capsys.readouterr().out
    text = (videos / "label.html").read_text()
    assert not re.search(r"https?://|src=[\"']|@import|url\(|<link", text)
    assert len(re.findall(r"\{\{", text)) == 2, "those of a prompt, which is no template"
    assert "\x1b" not in text and text.count("</script>") == 2, "a prompt cannot end a script"
    held = content(videos / "label.html")
    assert held["questions"] == {"text": "Which is better: text?", "motion": "Which moves better, and why?"}
    assert HOSTILE in {pair["prompt"] for pair in held["pairs"]}
    assert {name for pair in held["pairs"] for name in (pair["a"], pair["b"])} == set(held["videos"])
    assert held["videos"]["a 1.mp4"] == {"src": "a%201.mp4", "fps": 8.0}

    # What no browser plays is copied once, and the copy is no video of the folder's.
    copy = videos / held["videos"]["e.gif"]["src"]
    facts = facts_of(copy)
    assert copy.parent == videos / "label-videos" and facts.plays and not facts_of(videos / "e.gif").plays
    size = VideoSize(5, 16, 16, 8.0)
    assert (read_video(copy, size) - read_video(videos / "e.gif", size)).abs().max() < 0.05
    written = copy.stat().st_mtime_ns
    assert cli.main(["labels", "page", str(videos)]) == 0, "without a question"
    assert copy.stat().st_mtime_ns == written and len(content(videos / "label.html")["videos"]) == 5
    assert content(videos / "label.html")["questions"] == {"overall": "Which is better overall?"}


def test_one_file_holds_the_videos(videos: Path) -> None:
    assert cli.main(["labels", "page", str(videos), "--one-file", "--pairs", "2"]) == 0
    held = content(videos / "label.html")
    assert len(held["pairs"]) == 2
    assert all(video["src"].startswith("data:video/mp4;base64,") for video in held["videos"].values())


def test_what_cannot_be_asked(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PrflError, match="there are no videos in it"):
        asked_of(tmp_path, {})
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(browser_mp4(torch.zeros(3, 2, 16, 16), 8.0))
    with pytest.raises(PrflError, match="2 inputs are wrong"):  # no prompts
        asked_of(tmp_path, {})
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(PrflError, match="2 videos of 2 prompts, none of which has two"):
        asked_of(tmp_path, {}, prompt="a dog")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(PrflError, match="0 pairs"):
        asked_of(tmp_path, {}, prompt="a dog", count=0)
    with pytest.raises(PrflError, match="a head is what is uncertain"):
        asked_of(tmp_path, {}, prompt="a dog", choose="uncertain")
    assert cli.main(["labels", "page", str(tmp_path), "--prompt", "a dog"]) == 0
    assert "warning: no pair is held out" in capsys.readouterr().out, "of one prompt"
    with monkeypatch.context() as patch:
        patch.setattr("prfl.labels.asking.MANY", 0)
        assert cli.main(["labels", "page", str(tmp_path), "--prompt", "a dog"]) == 0
    assert "warning: 1 pairs are more than people answer" in capsys.readouterr().out
    (tmp_path / "b.mp4").write_bytes(b"no video")
    assert cli.main(["labels", "page", str(tmp_path), "--prompt", "a dog"]) == 2
    assert "b.mp4" in capsys.readouterr().err


@needs_node
def test_what_the_page_saves_is_our_manifest(videos: Path) -> None:
    assert cli.main(["labels", "page", str(videos), "--dimensions", "motion,text"]) == 0
    pairs = content(videos / "label.html")["pairs"]
    saved = node(
        f"""const pairs = {json.dumps(pairs)};
        let rows = {{}};
        const say = (index, dimension, choice) => (rows = page.withChoice(rows, pairs[index], dimension, choice));
        say(0, "motion", "b"), say(0, "motion", "a"), say(0, "text", "tie"), say(1, "text", "bad");
        say(2, "motion", "bad"), say(2, "motion", null), say(3, "text", "bad"), say(3, "text", "b");
        process.stdout.write(JSON.stringify([page.fileName("Ann B."), page.manifest(rows, pairs, "Ann B.")]));"""
    )
    name, text = json.loads(saved)
    assert name == "preferences-ann-b.jsonl"
    (videos / name).write_text(text)
    choices = [{"motion": "a", "text": "tie"}, {"text": "tie"}, None, {"text": "b"}]
    assert read_manifest(videos / name) == [
        PreferencePair(
            pair["prompt"].strip(),
            *[(videos / pair[side]).resolve() for side in "ab"],
            choice,  # type: ignore[arg-type]
            pair["split"],
        )
        for pair, choice in zip(pairs, choices, strict=True)
        if choice is not None
    ]
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line.get("both_bad") for line in lines] == [None, ["text"], None]
    assert {line["rater"] for line in lines} == {"Ann B."}


@needs_node
def test_the_way_through_the_pairs() -> None:
    """What is open comes next, around the end; an old visit's answers are taken up, and what it says of other pairs."""
    out = node(
        """const pairs = [1, 2, 3].map((i) => ({ prompt: "p", a: `a${i}`, b: `b${i}`, split: "train" }));
        const asked = ["motion", "text"];
        let rows = page.withChoice({}, pairs[1], "text", "a");
        const steps = [page.nextOpen(rows, pairs, asked, 0), page.firstOpen(rows, pairs[1], asked)];
        rows = page.withChoice(rows, pairs[1], "motion", "b");
        steps.push(page.nextOpen(rows, pairs, asked, 0), page.nextOpen(rows, pairs, asked, 2));
        for (const pair of pairs) for (const one of asked) rows = page.withChoice(rows, pair, one, "bad");
        steps.push(page.nextOpen(rows, pairs, asked, 2), page.firstOpen(rows, pairs[0], asked));
        const old = [{ prompt: "p", a: "a1", b: "b1", split: "validation", rater: "x", preference: { motion: "a" } },
                     { prompt: "p", a: "x", b: "y", preference: { motion: "a" } }, { a: "a2" }, null];
        const back = [JSON.stringify(old), "{broken", null, "null", "3"].map((text) => page.restored(text, pairs));
        const names = ["", "Zoë", "../x", "李"].map(page.fileName);
        console.log(JSON.stringify({ steps, back, names, keys: page.KEYS }));"""
    )
    told = json.loads(out)
    assert told["steps"] == [1, 0, 2, 0, -1, -1]
    assert told["back"] == [
        {
            "a1 b1": {"prompt": "p", "a": "a1", "b": "b1", "split": "train", "preference": {"motion": "a"}},
            "x y": {"prompt": "p", "a": "x", "b": "y", "preference": {"motion": "a"}},
        },
        *[{}] * 4,
    ]
    assert told["names"][0] == "preferences.jsonl" and len(set(told["names"])) == 4
    assert not any("/" in name or ".." in name for name in told["names"])
    assert set(told["keys"].values()) == {"a", "b", "tie", "bad"}
