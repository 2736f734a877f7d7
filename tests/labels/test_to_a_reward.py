"""From people's answers to a reward, and from the reward to the pairs that it is least sure of."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch

from prfl import cli
from prfl.evaluation.media import browser_mp4
from prfl.labels.asking import Asked, asked_of
from prfl.labels.collect import Collection
from prfl.labels.pairs import Pair, spread
from prfl.labels.uncertain import differ, unsure
from tests.few_levels import measure_few
from tests.labels.test_page import content


def test_a_head_is_least_sure_where_its_scores_lie_together() -> None:
    pairs = [Pair("p", "a", "b"), Pair("p", "a", "c"), Pair("p", "b", "c")]
    scores = {"a": {"m": 0.0, "t": 0.0}, "b": {"m": -3.0, "t": 0.1}, "c": {"m": 1.0, "t": 2.0}}
    assert unsure(pairs, scores, ["m", "t"]) == pytest.approx({"a b": -1.55, "a c": -1.5, "b c": -2.95})
    assert [pair.b for pair in spread(pairs, unsure(pairs, scores, ["t"]))] == ["b", "c", "c"]


def test_heads_that_all_call_a_pair_even_do_not_differ() -> None:
    pairs = [Pair("p", "a", "b"), Pair("p", "a", "c")]
    by_head = [{"a": {"m": 0.0}, "b": {"m": 0.0}, "c": {"m": gap}} for gap in (-1.0, 0.0, 1.0)]
    assert differ(pairs, by_head, ["m"]) == pytest.approx({"a b": 0.0, "a c": 1.0})
    assert [pair.b for pair in spread(pairs, differ(pairs, by_head, ["m"]))] == ["c", "b"]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Five prompts with three videos each, of different brightness, below ``clips``."""
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()
    for prompt in range(5):
        for number in range(3):
            pixels = torch.linspace(-1, prompt / 5, 5)[:, None, None].expand(3, 5, 16, 16) + 0.3 * number
            Path(f"clips/{prompt}-{number}.mp4").write_bytes(browser_mp4(pixels, 8.0))
            Path(f"clips/{prompt}-{number}.txt").write_text(f"a circle, take {prompt}")
    return asked_of(Path("clips"), {"light": "", "calm": ""})


@pytest.mark.slow
def test_half_the_answers_train_a_reward_that_chooses_what_is_asked_next(
    asked: Asked,
    tiny_pipeline_folder: Path,
    blank_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """A page left half way; the reward is measured on what was held out of it."""
    measure_few(monkeypatch)
    answers = Collection(asked.folder, asked.pairs, list(asked.questions))
    for pair in asked.pairs[: len(asked.pairs) // 2]:
        lighter = "a" if pair.a > pair.b else "b"
        answers.put({**pair.row, "rater": "Ann", "preference": {"light": lighter, "calm": "b"}})
    config = {
        "version": 1, "run": "run", "seed": 0, "backbone": {"model": str(tiny_pipeline_folder)},
        "data": {"manifest": str(answers.file("ann")), "cache": "cache",
                 "frames": 5, "height": 16, "width": 16, "fps": 8},
        "reward": {"space": "latent", "head": {"dimensions": ["light", "calm"], "blocks": [1]}},
        "rollout": {"steps": 2}, "objective": {"name": "preference", "loss": "bradley_terry"},
        "training": {"steps": 2, "batch": 2, "learning_rate": 1e-3}, "evaluation": {"every": 0},
    }  # fmt: skip
    Path("reward.yaml").write_text(json.dumps(config))
    assert cli.main(["train", "reward.yaml"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "no row has the split" not in told
    rows = json.loads(Path("run/reward_eval.json").read_text())["rows"]
    assert {row["dimension"] for row in rows} == {"light", "calm"}, "of the held-out pairs"

    # Without a held-out pair the run says so.
    file = answers.file("ann")
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines() if '"train"' in line))
    assert cli.main(["train", "reward.yaml", "run=blind"]) == 0
    assert "no row has the split validation" in capsys.readouterr().out

    # The pairs whose scores lie closest together come first.
    choice = ["--choose", "uncertain", "--head", "run/reward", "--dimensions", "light"]
    assert cli.main(["labels", "page", "clips", *choice]) == 0, capsys.readouterr().err
    capsys.readouterr()
    shown = [pair for pair in content(Path("clips/label.html"))["pairs"] if pair["split"] == "train"]
    assert cli.main(["score", "clips", "--head", "run/reward"]) == 0
    table = csv.DictReader(io.StringIO(capsys.readouterr().out))
    score = {Path(row["file"]).name: float(row["light"]) for row in table}
    distances = [abs(score[pair["a"]] - score[pair["b"]]) for pair in shown]
    assert distances == pytest.approx(sorted(distances), abs=1e-4) and distances[0] < distances[-1]
    assert cli.main(["labels", "page", "clips", *choice, "--head", "blind/reward"]) == 0, "where the two differ"
    assert cli.main(["labels", "page", "clips", *choice[:-1], "colour"]) == 2
    assert "the head scores none of colour" in capsys.readouterr().err
