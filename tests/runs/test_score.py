"""``prfl score``: videos, latents and manifests, at chosen noise levels, as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prfl import cli
from prfl.backbone import Backbone
from prfl.data.encoding import build_cache
from prfl.data.manifest import LabelledVideo, write_manifest
from prfl.data.video import read_video, write_video
from prfl.reward import LatentReward, PixelNetwork, PixelReward, RewardCard, RewardHead
from prfl.rollout.flow import add_noise
from prfl.runs import score
from prfl.utils import rng
from prfl.utils.video_size import VideoSize

CARD = RewardCard(frames=(5, 5), fps=(8.0, 8.0), height=(16, 16), width=(16, 16))
CLIP = {"frames": 5, "height": 16, "width": 16, "fps": 8.0}


@pytest.fixture
def reward(tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatentReward:
    """Saved as ``head``, beside two videos, with a normalisation that would be missed."""
    monkeypatch.chdir(tmp_path)
    for index in range(2):
        pixels = rng.normal((3, 5, 16, 16), 0, "video", 0, [index])[0].mul(0.3).clamp(-1, 1)
        write_video(tmp_path / f"{index}.mp4", pixels, 8)
    torch.manual_seed(0)
    reward = LatentReward(
        RewardHead(tiny_backbone.facts.widths[0], ["light", "calm"], inner=8, hidden=8), tiny_backbone, [1]
    )
    reward.card = CARD
    reward.calibrate({"light": torch.tensor([0.0, 2.0, 1.0]), "calm": torch.tensor([-1.0, 3.0])})
    reward.save_pretrained(tmp_path / "head")
    return reward


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_videos_as_csv_are_what_the_reward_says(
    reward: LatentReward, tiny_pipeline_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    model = ["--model", str(tiny_pipeline_folder)]
    arguments = ["0.mp4", "1.mp4", "--prompt", "a red circle", "--head", "head", *model, "--sigmas", "0,0.5"]
    assert cli.main(["score", *arguments, "--draws", "2", "--seed", "7"]) == 0, capsys.readouterr().err
    rows = rows_of(capsys.readouterr().out)
    assert [(row["file"], row["sigma"]) for row in rows] == [
        ("0.mp4", "0"), ("0.mp4", "0.5"), ("1.mp4", "0"), ("1.mp4", "0.5"),
    ]  # fmt: skip
    backbone = reward.backbone
    latents = backbone.encode(read_video("1.mp4", VideoSize(**CLIP))[None])
    condition = backbone.condition(["a red circle"])
    with torch.no_grad():
        clean = reward(latents, torch.tensor(0.0), condition)
        noisy = [
            reward(add_noise(latents, rng.normal(latents.shape[1:], 7, "score", draw, [0]), torch.tensor(0.5)),
                   torch.tensor(0.5), condition)["calm"]
            for draw in range(2)
        ]  # fmt: skip
    assert float(rows[2]["light"]) == pytest.approx(clean["light"].item(), abs=1e-5)
    assert float(rows[3]["calm"]) == pytest.approx(sum(noisy).item() / 2, abs=1e-5)
    assert rows[2]["light"] != rows[0]["light"] != rows[1]["light"]


def test_a_manifest_cached_and_plain_latents_as_json(
    reward: LatentReward, tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The same video by three ways gives the same score; the base model comes from the run that the head lies in."""
    write_manifest("manifest.jsonl", [LabelledVideo(tmp_path / "0.mp4", "a blue square", {})])
    build_cache(reward.backbone, "manifest.jsonl", "cache", VideoSize(**CLIP), progress=False)
    (cached,) = Path("cache/latents").iterdir()
    latents = reward.backbone.encode(read_video("0.mp4", VideoSize(**CLIP))[None])
    save_file({"x": torch.cat([latents, 2 * latents])}, "plain.safetensors")
    arguments = ["manifest.jsonl", str(cached), "plain.safetensors", "--prompt", "a blue square", "--head", "head"]
    assert cli.main(["score", *arguments, "--out", "out.json"]) == 2
    message = capsys.readouterr().err
    assert "no video model is given, and it was trained on tiny-wan" in message and "--model" in message
    model = ["--model", str(tiny_pipeline_folder)]
    assert cli.main(["score", *arguments, *model, "--out", "out.json"]) == 0, capsys.readouterr().err
    told = json.loads(Path("out.json").read_text())
    assert told["reward"] == "head" and told["clip"] == CLIP
    files = [(row["file"], row["sample"], row["prompt"]) for row in told["rows"]]
    plain = [("plain.safetensors", sample, "a blue square") for sample in (0, 1)]
    assert files == [("0.mp4", 0, "a blue square"), (str(cached), 0, "a blue square"), *plain]
    light = [row["scores"]["light"] for row in told["rows"]]
    assert light[0] == pytest.approx(light[1], abs=1e-5) and light[0] == pytest.approx(light[2], abs=1e-5)
    assert light[3] != pytest.approx(light[0], abs=1e-3)


def test_a_pixel_reward_of_a_run_needs_no_model_option(tiny_run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tiny_run()
    write_video(tmp_path / "a.mp4", torch.zeros(3, 5, 16, 16), 8)
    PixelReward(PixelNetwork(16, ["light"], hidden=8, inner=8), card=CARD).save_pretrained(run / "reward")
    arguments = [str(tmp_path / "a.mp4"), "--prompt", "a red circle", "--head", str(run / "reward"), "--sigmas", "0.3"]
    assert cli.main(["score", *arguments]) == 0, capsys.readouterr().err
    shown = capsys.readouterr()
    assert len(rows_of(shown.out)) == 1
    assert "above sigma 0 it scores the decoded clean prediction" in " ".join(shown.err.split())


def test_what_cannot_be_scored(reward: LatentReward, tiny_pipeline_folder: Path, capsys: pytest.CaptureFixture) -> None:
    def fails(*arguments: str) -> str:
        assert cli.main(["score", *arguments, "--head", "head", "--model", str(tiny_pipeline_folder)]) == 2
        return capsys.readouterr().err

    prompt = ("--prompt", "a red circle")
    assert "this file has none" in fails("0.mp4")
    assert "there is no such file" in fails("2.mp4", *prompt)
    assert "'.txt' cannot be scored" in fails("a.txt", *prompt)
    assert "1.5 is no noise level" in fails("0.mp4", *prompt, "--sigmas", "0,1.5")
    assert "'.xml' is not a format" in fails("0.mp4", *prompt, "--out", "a.xml")
    assert "no mean over no draws" in fails("0.mp4", *prompt, "--draws", "0")
    Path("broken.mp4").write_bytes(b"no video")
    save_file({"latents": torch.zeros(16, 2, 4, 4)}, "other.safetensors")
    save_file({"latents": torch.full((4, 2, 4, 4), torch.inf)}, "infinite.safetensors")
    save_file({"latents": torch.zeros(4, 2, 3, 4)}, "odd.safetensors")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, "two.safetensors")
    Path("short.safetensors").write_bytes(Path("two.safetensors").read_bytes()[:-3])
    broken = ["broken.mp4", *(f"{name}.safetensors" for name in ("other", "infinite", "odd", "two", "short"))]
    message = fails(*broken, "0.mp4", *prompt, "--out", "out.csv")
    assert "6 of 7 files were not scored" in message
    for part in ("has 16 channels, and the latents of", "not finite", "height of 3 in", "it has a, b"):
        assert part in message
    assert all(f"{name}: " in message for name in broken)
    assert [row["file"] for row in rows_of(Path("out.csv").read_text())] == ["0.mp4"], "the others are scored"
    assert (
        cli.main(["score", "0.mp4", *prompt, "--head", "head", "--model", str(tiny_pipeline_folder), "--fps", "4"]) == 2
    )
    assert "the reward was trained with fps 8, and scores 4" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_scores_are_there_however_the_command_ends(
    reward: LatentReward, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """A file's name is not UTF-8, and at the last file the command is interrupted."""
    strange = Path(os.fsdecode(b"caf\xe9.mp4"))
    shutil.copy("0.mp4", strange)
    out, read = Path(f"out.{suffix}"), score.read_latents

    def interrupted(file: Path, *others):
        if file == Path("1.mp4"):
            raise KeyboardInterrupt
        return read(file, *others)

    monkeypatch.setattr(score, "read_latents", interrupted)
    files = ["0.mp4", str(strange), "1.mp4", "--prompt", "a red circle", "--out", str(out)]
    assert cli.main(["score", *files, "--head", "head", "--model", str(tiny_pipeline_folder)]) == 130
    text = out.read_text(encoding="utf-8")
    rows = json.loads(text)["rows"] if suffix == "json" else rows_of(text)
    assert [row["file"] for row in rows] == ["0.mp4", "caf\\xe9.mp4"]


def test_the_table_is_whole_after_every_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that is killed writes nothing at its end."""
    monkeypatch.setattr(score, "SECONDS", 0.0)
    table = score.ScoreTable(tmp_path / "out.json", {"seed": 0})
    for number in range(3):
        table.add([score.Scored(f"{number}.mp4", 0, "a", 0.0, {"light": 1.0})])
        assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == number + 1


@pytest.mark.pictures
def test_a_folder_is_ranked_within_each_prompt(
    reward: LatentReward, tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Prompts beside the videos; the best of each are copied with them, and shown."""
    for number in range(5):
        pixels = rng.normal((3, 5, 16, 16), 0, "more", 0, [number])[0].mul(0.3).clamp(-1, 1)
        write_video(tmp_path / f"clips/{number // 3}/{number}.mp4", pixels, 8)
        prompt = "a red circle" if number < 3 else "a blue square"
        (tmp_path / f"clips/{number // 3}/{number}.txt").write_text(f"{prompt}\n")
    arguments = ["--head", "head", "--model", str(tiny_pipeline_folder)]
    assert cli.main(["score", "clips", *arguments]) == 0, capsys.readouterr().err
    plain = {row["file"]: float(row["light"]) + float(row["calm"]) for row in rows_of(capsys.readouterr().out)}
    assert len(plain) == 5

    ranked = ["--best", "2", "--copy-to", "best", "--page", "best.html", "--out", "all.csv"]
    assert cli.main(["score", "clips/**/*.mp4", *arguments, *ranked]) == 0, capsys.readouterr().err
    shown, told = capsys.readouterr()
    rows = rows_of(shown)
    assert [row["rank"] for row in rows] == ["1", "2", "1", "2"]
    expected = []
    for folder in ("0", "1"):
        files = sorted((file for file in plain if Path(file).parent.name == folder), key=lambda file: -plain[file])
        expected += files[:2]
    assert [row["file"] for row in rows] == expected
    assert float(rows[0]["total"]) == pytest.approx(plain[expected[0]], abs=1e-4)
    assert "one standard deviation better" in told and "within a prompt" in told
    assert len(rows_of(Path("all.csv").read_text())) == 5

    copies = sorted(path.name for path in Path("best").iterdir())
    names = [f"{number}-{Path(file).name}" for number, file in enumerate(expected, start=1)]
    assert copies == sorted([*names, *(f"{Path(name).stem}.txt" for name in names)])
    assert Path(f"best/{names[0]}").read_bytes() == Path(expected[0]).read_bytes()
    assert Path(f"best/{Path(names[2]).stem}.txt").read_text() == "a blue square\n"
    page = Path("best.html").read_text()
    assert page.count("<video ") == 4 and "a blue square" in page and "https://" not in page
    assert cli.main(["score", "clips", *arguments, "--rank", "--copy-to", "best"]) == 0
    assert len(list(Path("best").glob("*.mp4"))) == 9, "nothing is overwritten"


def test_folders_and_patterns_that_hold_nothing(reward: LatentReward, capsys: pytest.CaptureFixture) -> None:
    Path("empty").mkdir()
    Path("0.txt").write_text("\n")
    for name, message in (("empty", "no videos"), ("none-*.mp4", "no videos"), ("0.mp4", "it is empty")):
        assert cli.main(["score", name, "--head", "head", "--prompt", "a"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["score", "1.mp4", "--head", "head"]) == 2
    assert "1.txt beside it" in capsys.readouterr().err
    assert cli.main(["score", "1.mp4", "--head", "head", "--prompt", "a", "--best", "0"]) == 2
    assert "--best" in capsys.readouterr().err
