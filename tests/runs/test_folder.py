"""From a folder of a.mp4 and a.txt to a reward and a policy, by what `prfl init` writes; and what is refused before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from prfl import cli
from prfl.backbone import load_architecture
from prfl.config import load_config
from prfl.data.headers import Header
from prfl.data.video import write_video
from prfl.factory.backbone import build_architecture, shapes_or
from prfl.factory.objective import build_method
from prfl.runs.project import sizes_for
from prfl.utils.video_size import VideoSize
from tests.data.test_clips import texture
from tests.few_levels import measure_few
from tests.wan_experts import save_tiny_experts

TEXTS = ["waves on a lake", "clouds in the evening", "leaves in the wind", "smoke over a town"]
FEW = ["training.steps=2", "training.batch=2", "evaluation.every=0"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: four videos of 2 s, 48 x 64 pixels at 12 fps, each with its prompt beside it."""
    folder = tmp_path_factory.mktemp("own") / "my clips"
    for number, text in enumerate(TEXTS):
        write_video(folder / f"{number}.mp4", texture(24, 48, 64, seed=number), 12)
        (folder / f"{number}.txt").write_text(f"{text}\n")
    return folder


@pytest.fixture
def project(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, blank_pictures: None) -> Path:
    monkeypatch.chdir(tmp_path)
    measure_few(monkeypatch)
    shutil.copytree(videos, "my clips")
    return tmp_path


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_what_init_writes_trains_a_reward_and_a_policy(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["init", "my clips"]) == 0, capsys.readouterr().err
    reward, policy = (load_config(f"my-clips-prfl/{name}.yaml") for name in ("reward", "policy"))
    assert (reward.data.frames, reward.data.height, reward.data.width, reward.data.fps) == (13, 24, 32, 8)
    assert policy.data.folder == Path("my clips") and reward.evaluation.every == 100

    few = [f"{stage}.{key}" for stage in ("reward", "policy") for key in FEW]
    assert cli.main(["train", "my-clips-prfl/project.yaml", *few]) == 0, capsys.readouterr().err
    (pairs,) = Path("runs/cache").glob("video_clips-*/pairs.jsonl")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert {row["prompt"] for row in rows} == set(TEXTS) and {row["split"] for row in rows} == {"train", "validation"}
    (manifest,) = Path("runs/cache").glob("folder-*.jsonl")
    assert {json.loads(line)["video"] for line in manifest.read_text().splitlines()} == {f"{n}.mp4" for n in range(4)}
    assert Path("runs/my-clips-reward/reward/reward.safetensors").is_file()
    assert Path("runs/my-clips-policy/policy.safetensors").is_file()

    assert "name a folder of videos" in refused(capsys, "init", "nowhere")
    assert "prfl labels import makes one" in refused(capsys, "init", "my clips/0.txt")
    assert "there is a project.yaml already" in refused(capsys, "init", "my clips")
    Path("my clips/0.txt").unlink()
    assert "my clips/0.mp4: there is no text beside this video" in refused(capsys, "init", "my clips", "--out", "x")


def test_init_of_a_manifest_takes_its_labels(project: Path, tiny_pipeline_folder: Path) -> None:
    rows = [
        {"prompt": text, "a": f"my clips/{n}.mp4", "b": f"my clips/{1 - n}.mp4", "preference": {"text match": "a"}}
        for n, text in enumerate(TEXTS[:2])
    ]
    Path("labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["init", "labels.jsonl", "--model", str(tiny_pipeline_folder), "--out", "p"]) == 0
    reward, policy = (load_config(f"p/{name}.yaml") for name in ("reward", "policy"))
    assert reward.reward and reward.reward.head_dimensions == ["text match"] and reward.evaluation.every == 0
    assert not policy.reads_clips and policy.data.manifest == reward.data.manifest


def config(**data: object) -> str:
    """A config of SFT for these data."""
    tree = yaml.safe_load(Path("p/policy.yaml").read_text())
    size = {key: tree["data"][key] for key in ("cache", "frames", "height", "width", "fps")}
    tree |= {"data": {**size, **data}, "objective": {"name": "sft"}, "reward": None}
    Path("x.yaml").write_text(yaml.safe_dump(tree))
    return "x.yaml"


def test_init_of_two_experts_reads_the_reward_where_it_can_be_read(project: Path) -> None:
    """Every step of the policy's run, of which the high-noise expert has some; of a large model one is on the GPU."""
    model = save_tiny_experts(Path("tiny-a14b"))
    assert cli.main(["init", "my clips", "--model", str(model), "--out", "p"]) == 0
    policy = load_config("p/policy.yaml")
    method = build_method(policy, build_architecture(policy))
    assert {min(method.plan(step).plan.trains) <= 6 for step in range(20)} == {True, False}
    assert policy.objective.handoff == "clean" and policy.backbone.experts is None
    assert cli.main(["init", "my clips", "--model", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "--out", "large"]) == 0
    for name in ("reward", "policy"):
        assert load_config(f"large/{name}.yaml").backbone.experts.resident == "one"


def test_the_cache_refuses_what_the_training_would(project: Path, capsys: pytest.CaptureFixture) -> None:
    """Before anything is encoded."""
    assert cli.main(["init", "my clips", "--out", "p"]) == 0
    pair = {"prompt": "x", "a": "my clips/0.mp4", "b": "my clips/1.mp4", "preference": {"look": "tie"}}
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n")
    pairs = ["data.generator=null", "data.manifest=pairs.jsonl", "evaluation.every=0"]
    shown = [
        refused(capsys, "cache", config(manifest="pairs.jsonl"), "evaluation.every=0"),
        refused(capsys, "cache", "p/reward.yaml", "reward.head.dimensions=[look]", *pairs),
        refused(capsys, "train", "p/reward.yaml", "reward.head.dimensions=[look]", *pairs),
        refused(capsys, "cache", config(folder="my clips", held_out=0.0)),
        refused(capsys, "train", config(folder="my clips", held_out=0.0)),
        refused(capsys, "cache", config(folder="my clips"), "evaluation.final_samples=4"),
        refused(capsys, "cache", "p/reward.yaml", "data.generator=null", "data.folder=my clips"),
    ]
    words = [
        "trains on videos, not on pairs",
        "1 pairs are all ties",
        "1 pairs are all ties",
        "needs validation prompts",
    ]
    words += ["needs validation prompts", "needs test prompts", "have no labels"]
    assert all(word in text for word, text in zip(words, shown, strict=True)), shown
    assert not list(Path("runs/cache").glob("latents/*"))


def test_an_imported_public_layout_trains_a_reward(project: Path, capsys: pytest.CaptureFixture) -> None:
    """VideoAlign's training table, as `prfl labels import` reads it, and a project of it; one pair is for the end."""
    lines = ["path_A,path_B,prompt,VQ,MQ,TA,fps_A,split", "my clips/0.mp4,my clips/1.mp4,a lake,A,same,B,12,train"]
    Path("train.csv").write_text("\n".join([*lines, "my clips/2.mp4,my clips/3.mp4,smoke,B,same,B,12,test"]))
    assert cli.main(["labels", "import", "train.csv", "--preset", "videoalign"]) == 0, capsys.readouterr().err
    assert cli.main(["init", "train.jsonl", "--out", "p"]) == 0

    few = [*FEW, "reward.head.dimensions=[VQ, TA]"]
    assert cli.main(["train", "p/reward.yaml", *few]) == 0, capsys.readouterr().err
    assert Path("runs/p-reward/reward/reward.safetensors").is_file()
    measured = json.loads(Path("runs/p-reward/reward_eval-test.json").read_text())
    assert measured["split"] == "test" and {row["pairs"] for row in measured["rows"]} == {1}
    assert "needs validation prompts" in refused(capsys, "train", "p/reward.yaml", *few, "evaluation.every=1")
    assert cli.main(["eval", "--run", "runs/p-reward"]) == 2 and "--split" in capsys.readouterr().err


def test_init_gives_upright_videos_a_size_of_their_own() -> None:
    network = load_architecture(shapes_or("shapes"))
    wide, tall = Header(48, 80, 12.0, 3.0), Header(80, 48, 12.0, 3.0)
    sizes = [VideoSize(17, 24, 32, 8), VideoSize(17, 32, 24, 8)]
    assert sizes_for(network, "shapes", [*[wide] * 5, tall]) == sizes
    assert sizes_for(network, "shapes", [*[wide] * 20, tall]) == sizes[:1], "one in twenty-one is cut"


def test_init_gives_slow_videos_a_rate_of_their_own() -> None:
    """Read at the others' rate they would repeat their pictures, and be refused."""
    network = load_architecture(shapes_or("shapes"))
    fast, slow = Header(48, 64, 24.0, 3.0), Header(48, 64, 4.0, 4.0)
    sizes = [VideoSize(17, 24, 32, 8), VideoSize(13, 24, 32, 4)]
    assert sizes_for(network, "shapes", [*[fast] * 5, slow]) == sizes
    assert sizes_for(network, "shapes", [*[fast] * 20, slow]) == sizes[:1], "one in twenty-one"
    few_fast = sizes_for(network, "shapes", [fast, *[slow] * 3])
    assert few_fast == [VideoSize(9, 24, 32, 4)], "the fast one is read as slowly; it has 3 s"
