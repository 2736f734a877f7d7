"""`prfl eval --benchmark` on a small invented copy of VideoGen-RewardBench, and on a manifest."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from prfl import cli
from prfl.backbone import load_backbone
from prfl.data.video import write_video
from prfl.reward import LatentReward, RewardCard, RewardHead
from prfl.reward.checkpoint import read_config
from tests.data.test_clips import texture

SIZE = {"frames": (5, 5), "height": (16, 16), "width": (16, 16), "fps": (8.0, 8.0)}
ANSWERS = ("A", "same", "same", "B")  # so that calling nothing a tie is not best
PAIRS = [(a, b) for a in range(4) for b in range(a)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_folder: Path) -> Path:
    """Read only: a head of random weights, and the set: six pairs of four videos, and one whose video is not there."""
    folder = tmp_path_factory.mktemp("bench")
    head = RewardHead(24, ["VQ", "motion"], inner=8, hidden=8)
    reward = LatentReward(head, load_backbone(tiny_pipeline_folder), [1], card=RewardCard(**SIZE))
    reward.save_pretrained(folder / "head")
    for number in range(4):
        write_video(folder / f"set/videos/{number}.mp4", texture(6, 16, 16, seed=number), 8)
    with (folder / "set/videogen-rewardbench.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path_A", "path_B", "prompt", "VQ", "MQ", "TA", "Overall", "fps_A"])
        for number, (a, b) in enumerate([*PAIRS, (0, 9)]):
            paths = [f"videos/{name}.mp4" for name in (a, b)]
            answers = [ANSWERS[(number + shift) % 4] for shift in range(3)]
            table.writerow([*paths, f"a {['red', 'blue'][number % 2]} circle", *answers, "" if number == 2 else "A", 8])
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(bench: Path, tiny_pipeline_folder: Path, *arguments: str) -> int:
    return cli.main(["eval", "--head", str(bench / "head"), "--model", str(tiny_pipeline_folder), *arguments])


def by_hand(answers: list[str], differences: list[float]) -> tuple[float, float]:
    """Both accuracies, by trying every threshold."""
    decided = [
        (answer == "A") == (gap > 0) for answer, gap in zip(answers, differences, strict=True) if answer != "same"
    ]
    shares = []
    for threshold in [0.0, *(abs(gap) + 1e-6 for gap in differences)]:
        said = ["same" if abs(gap) <= threshold else "A" if gap > 0 else "B" for gap in differences]
        shares.append(sum(map(str.__eq__, said, answers)) / len(said))
    return sum(decided) / len(decided), max(shares)


@pytest.mark.usefixtures("here")
def test_a_public_set(
    bench: Path, tiny_pipeline_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = ["--benchmark", "videogen-rewardbench", "--root", str(bench / "set"), "--dimensions", "VQ=VQ,motion=MQ"]
    assert run(bench, tiny_pipeline_folder, *named) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "videos/9.mp4" in shown and "73.59%" in shown and "73.43%" in shown and "1 left out" in shown

    # The scores that lie on the disk, compared by hand.
    scores, lines = {}, next(Path("runs/benchmark-videogen-rewardbench").glob("*.jsonl")).read_text().splitlines()
    for row in map(json.loads, lines[1:]):
        scores[Path(row["video"]).stem, row["prompt"]] = row["scores"]
    rows = list(csv.DictReader((bench / "set/videogen-rewardbench.csv").open()))[:-1]
    measured = json.loads(Path("runs/benchmark-videogen-rewardbench/results.json").read_text())["head"]
    for name, own in {"VQ": ["VQ"], "MQ": ["motion"], "Overall": ["VQ", "motion"]}.items():
        kept = [row for row in rows if row[name]]
        for sigma in ("0.0", "0.5"):
            sides = [[scores[Path(row[f"path_{side}"]).stem, row["prompt"]][sigma] for side in "AB"] for row in kept]
            gaps = [sum(a[each] - b[each] for each in own) for a, b in sides]
            expected = by_hand([row[name] for row in kept], gaps)
            level = f"{float(sigma):g}"
            given = measured["accuracy"][name][level], measured["accuracy_ties"][name][level]
            assert given == pytest.approx(expected, abs=1e-4), (name, sigma)
    assert measured["ties"] == {"VQ": 3, "MQ": 4, "Overall": 0} and "TA" not in measured["accuracy"]

    # The card says it, and is still whole.
    config = read_config(bench / "head")
    assert config["card"]["benchmarks"]["videogen-rewardbench"]["pairs_read"] == 6
    card = yaml.safe_load((bench / "head/README.md").read_text().split("---")[1])
    assert card["datasets"] == ["KlingTeam/VideoGen-RewardBench"]
    (index,) = card["model-index"]
    assert {result["dataset"]["type"] for result in index["results"]} == {"KlingTeam/VideoGen-RewardBench"}

    # What was scored is not scored again, and another noise level is.
    monkeypatch.setattr("prfl.runs.benchmark.read_latents", lambda *_: pytest.fail("read again"))
    assert run(bench, tiny_pipeline_folder, *named) == 0
    with pytest.raises(pytest.fail.Exception, match="read again"):
        run(bench, tiny_pipeline_folder, *named, "--sigmas", "0.9")


@pytest.mark.usefixtures("here")
def test_what_is_refused(bench: Path, tiny_pipeline_folder: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(*arguments: str) -> str:
        assert run(bench, tiny_pipeline_folder, *arguments) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "did you mean 'videogen-rewardbench'" in refused("--benchmark", "videogen-rewardbnch")
    assert "--root FOLDER, where videogen-rewardbench.csv" in refused("--benchmark", "videogen-rewardbench")
    root = ["--benchmark", "videogen-rewardbench", "--root", str(bench / "set")]
    assert "names no dimension of both" in refused(*root, "--dimensions", "look=VQ")
    assert "only a benchmark has it" in refused("--sigmas", "0")
    assert "a benchmark is of saved rewards alone" in refused(*root, "--split", "test")
