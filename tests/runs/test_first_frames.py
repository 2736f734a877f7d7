"""Commands on models that begin with a picture: a clip is scored, labelled and asked for with its own first frame."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from prfl import cli
from prfl.backbone import Ask
from prfl.backbone.first_frame import FirstFrameBackbone
from prfl.config import load_config
from prfl.data.encoding import build_cache
from prfl.data.manifest import LabelledVideo, PreferencePair, write_manifest
from prfl.data.video import read_video, write_video
from prfl.factory.prompts import check_prompts, load_prompts
from prfl.labels.pairs import Pair
from prfl.labels.uncertain import head_scores
from prfl.reward import LatentReward, RewardCard, RewardHead
from prfl.utils import rng
from prfl.utils.errors import PrflError
from prfl.utils.pictures import read_first_frame, write_picture
from tests.models import copied_from, copies_in_place_of_loading
from tests.slow import slow_unless
from tests.svd import save_tiny_svd
from tests.wan_image import CLIP, save_tiny_pinned_frame, save_tiny_wan_image

PROMPTS = ["a red circle", "a blue square"]
SAVERS = {"wan_image": save_tiny_wan_image, "wan_pinned_frame": save_tiny_pinned_frame, "svd": save_tiny_svd}
CARD = RewardCard(frames=(9, 9), fps=(8.0, 8.0), height=(16, 16), width=(16, 16))


@pytest.fixture(scope="module", params=slow_unless("svd".__ne__, SAVERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVERS[request.param](tmp_path_factory.mktemp("models") / "tiny-i2v")


@pytest.fixture
def model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FirstFrameBackbone:
    copies_in_place_of_loading(folder, monkeypatch)
    return copied_from(folder)


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two, with their prompts beside them; one is shown turned, and not square."""
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()
    files = [Path(f"clips/{number}.mp4") for number in range(2)]
    for number, file in enumerate(files):
        pixels = rng.normal((3, 9, 16, 16 + 8 * number), 0, "video", 0, [number])[0].mul(0.3).clamp(-1, 1)
        write_video(file, pixels, 8)
        file.with_suffix(".txt").write_text(PROMPTS[number])
    return files


@pytest.fixture
def reward(model: FirstFrameBackbone, videos: list[Path]) -> LatentReward:
    torch.manual_seed(0)
    block = model.facts.usual_block
    head = RewardHead(model.facts.width_after([block]), ["light"], inner=8, hidden=8)
    reward = LatentReward(head, model, [block], card=CARD).freeze()
    reward.save_pretrained(Path("head"))
    return reward


def scored(capsys: pytest.CaptureFixture, *arguments: str) -> dict[str, float]:
    capsys.readouterr()
    assert cli.main(["score", *arguments, "--head", "head"]) == 0, capsys.readouterr().err
    return {row["file"]: float(row["light"]) for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}


def test_a_video_begins_with_its_first_frame(videos: list[Path]) -> None:
    for file in videos:
        assert torch.equal(read_first_frame(file, 16, 16), read_video(file, CLIP)[:, 0])
    Path("broken.mp4").write_bytes(b"no video")
    with pytest.raises(PrflError, match=r"broken\.mp4"):
        read_first_frame(Path("broken.mp4"), 16, 16)


def test_files_are_scored_as_videos_of_their_first_frames(
    reward: LatentReward, model: FirstFrameBackbone, folder: Path, videos: list[Path], capsys: pytest.CaptureFixture
) -> None:
    scores = scored(capsys, "clips", "--model", str(folder))
    latents = [model.encode(read_video(file, CLIP)[None]) for file in videos]
    for number, file in enumerate(videos):
        write_picture(Path(f"{number}.png"), read_video(file, CLIP)[:, 0])
    for number, file in enumerate(videos):
        asks = [Ask(PROMPTS[number], Path(f"{each}.png"), CLIP) for each in (number, 1 - number)]
        expected, other = (float(reward.score(latents[number], 0.0, [ask])["light"]) for ask in asks)
        assert scores[str(file)] == pytest.approx(expected, abs=2e-6)
        assert abs(other - expected) > 2e-5, "another first frame is another score"

    # Latents begin with the picture beside them, or in the cache that they are of; else they are refused.
    save_file({"latents": latents[0][0].contiguous()}, "0.safetensors")
    here = scored(capsys, "0.safetensors", "--prompt", PROMPTS[0], "--model", str(folder))
    assert here["0.safetensors"] == pytest.approx(scores["clips/0.mp4"], abs=1e-5)
    write_manifest(Path("m.jsonl"), [LabelledVideo(videos[0], PROMPTS[0], {})])
    build_cache(model, "m.jsonl", "cache", CLIP, progress=False)
    (cached,) = Path("cache/latents").glob("*.safetensors")
    of_cache = scored(capsys, str(cached), "--prompt", PROMPTS[0], "--model", str(folder))
    assert of_cache[str(cached)] == pytest.approx(scores["clips/0.mp4"], abs=1e-5)
    Path("0.png").unlink()
    Path("clips/broken.mp4").write_bytes(b"no video")
    several = ["clips", "0.safetensors", "--prompt", PROMPTS[0], "--head", "head", "--model", str(folder)]
    assert cli.main(["score", *several]) == 2
    printed = capsys.readouterr()
    assert "2 of 4 files were not scored" in printed.err and "put it beside them as 0.png" in printed.err
    assert printed.out.count("clips/") == 2, "the others are scored"


def test_pairs_are_chosen_by_heads_that_read_first_frames(
    reward: LatentReward, folder: Path, videos: list[Path], capsys: pytest.CaptureFixture
) -> None:
    pairs = [Pair(PROMPTS[0], "0.mp4", "1.mp4")]
    scores = head_scores(Path("clips"), pairs, "head", str(folder))
    table = scored(capsys, *map(str, videos), "--prompt", PROMPTS[0], "--model", str(folder))
    assert scores["0.mp4"]["light"] == pytest.approx(table["clips/0.mp4"], abs=1e-5)
    assert scores["0.mp4"] != scores["1.mp4"]


def test_a_benchmark_asks_with_first_frames(
    reward: LatentReward, folder: Path, videos: list[Path], capsys: pytest.CaptureFixture
) -> None:
    Path("clips/broken.mp4").write_bytes(b"no video")
    rows = [
        PreferencePair(PROMPTS[0], a, b, {"light": "a"}) for a, b in (videos, (videos[0], Path("clips/broken.mp4")))
    ]
    write_manifest(Path("pairs.jsonl"), rows)
    asked = ["--benchmark", "pairs.jsonl", "--sigmas", "0", "--model", str(folder)]
    assert cli.main(["eval", "--head", "head", *asked]) == 0, capsys.readouterr().err
    assert "1 videos cannot be read" in "".join(capsys.readouterr()).replace("\n", " ")
    (lines,) = [file.read_text().splitlines() for file in Path("runs/benchmark-pairs").glob("*.jsonl")]
    measured = {Path(row["video"]).name: row["scores"]["0.0"]["light"] for row in map(json.loads, lines[1:])}
    table = scored(capsys, str(videos[0]), "--prompt", PROMPTS[0], "--model", str(folder))
    assert measured["0.mp4"] == pytest.approx(table["clips/0.mp4"], abs=1e-5)
    assert measured.keys() == {"0.mp4", "1.mp4"}


def test_a_project_asks_with_the_clips_first_frames(
    model: FirstFrameBackbone, folder: Path, videos: list[Path], capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["init", "clips", "--model", str(folder), "--out", "p"]) == 0, capsys.readouterr().err
    assert "first_frames: true" in Path("p/policy.yaml").read_text()
    assert "first_frames" not in Path("p/reward.yaml").read_text(), "each clip has its own there"
    config = load_config("p/policy.yaml", ["reward.path=head", "evaluation.every=0"])
    asks = [ask for part in load_prompts(config.data).values() for ask in part]
    assert sorted((ask.prompt, ask.image.name) for ask in asks) == [(PROMPTS[1], "1.mp4"), (PROMPTS[0], "0.mp4")]
    check_prompts(config, model)
    without = config.data.prompts.model_copy(update={"first_frames": False})
    config = config.model_copy(update={"data": config.data.model_copy(update={"prompts": without})})
    with pytest.raises(PrflError, match=r"needs a first frame.*\n.*first_frames: true"):
        check_prompts(config, model)


@pytest.fixture
def policy_of(folder: Path, videos: list[Path]) -> Callable[..., list[str]]:
    """The faults of a config whose prompts come from clips."""

    def make(objective: str = "prfl", **data: object) -> list[str]:
        reward = {"space": "latent", "path": "head"}
        if objective == "preference":
            reward = {"space": "latent", "head": {"dimensions": ["light"], "blocks": [0]}}
        loss = {"loss": "bce"} if objective == "preference" else {}
        adapter = {} if objective == "preference" else {"adapter": {"rank": 2, "alpha": 2}}
        config = {
            "version": 1, "run": "run", "seed": 0, "backbone": {"model": str(folder), "device": "cpu", **adapter},
            "data": {"cache": "cache", "frames": 9, "height": 16, "width": 16, "fps": 8, **data},
            "reward": reward, "rollout": {"steps": 2}, "objective": {"name": objective, **loss},
            "training": {"steps": 1, "batch": 1, "learning_rate": 1e-3}, "evaluation": {"every": 0},
        }  # fmt: skip
        Path("x.yaml").write_text(yaml.safe_dump(config))
        try:
            load_config("x.yaml")
        except PrflError as error:
            return [line for line in str(error).splitlines() if "first_frames" in line]
        return []

    return make


def test_first_frames_that_no_prompt_gets_are_refused(policy_of: Callable[..., list[str]]) -> None:
    write_manifest(
        Path("m.jsonl"), [PreferencePair(PROMPTS[0], *map(Path, ("clips/0.mp4", "clips/1.mp4")), {"light": "b"})]
    )
    Path("p.txt").write_text(PROMPTS[0])
    named = {"first_frames": True, "train": "p.txt"}
    assert policy_of(manifest="m.jsonl", prompts={"first_frames": True}) == []
    (row,) = load_prompts(load_config("x.yaml").data)["train"]
    assert (row.prompt, row.image.name, row.clip) == (PROMPTS[0], "0.mp4", CLIP)
    assert "no clips that bring prompts" in policy_of(prompts=named)[0]
    (fault,) = policy_of("preference", manifest="m.jsonl", prompts={"first_frames": True})
    assert "each clip has its own first frame" in fault
    everything = {**named, "validation": "p.txt", "test": "p.txt"}
    assert "all prompts are of files" in policy_of(folder="clips", prompts=everything)[0]
