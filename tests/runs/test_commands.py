"""The commands from end to end on a random tiny model and video files written here: no shapes world, no network."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import av
import pytest
import torch
import yaml
from safetensors.torch import load_file

from prfl import cli
from prfl.backbone import load_backbone
from prfl.backbone.source import Source
from prfl.data.manifest import LabelledVideo, read_manifest, write_manifest
from prfl.data.video import write_video
from prfl.evaluation.reward_eval import MEASURES
from prfl.factory import backbone as backbone_factory
from prfl.reward import LatentReward, RewardHead
from prfl.utils import rng
from tests import pictures
from tests.few_levels import measure_few
from tests.models import copies_in_place_of_loading
from tests.reward.test_aesthetic import tiny_clip, tiny_mlp
from tests.slow import slow_unless

PROMPTS = {"train": ["a red circle", "a blue square"], "validation": ["a green circle"], "test": ["a red square"]}
DATA = {"cache": "cache", "frames": 5, "height": 16, "width": 16, "fps": 8}


@pytest.fixture
def project(tmp_path: Path, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, blank_pictures: None) -> Path:
    """A folder with prompts, labelled clips and configs that refer to each other."""
    monkeypatch.chdir(tmp_path)
    lighten(monkeypatch, tiny_pipeline_folder)
    write_project(tiny_pipeline_folder)
    return tmp_path


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_folder: Path) -> Path:
    """Read only: the project where both rewards and the policy of ``prfl.yaml`` are trained."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pictures.leave_out(patch)
        lighten(patch, tiny_pipeline_folder)
        write_project(tiny_pipeline_folder)
        assert cli.main(["train", "story.yaml"]) == cli.main(["train", "pixel.yaml"]) == 0
    return folder


@pytest.fixture
def trained(
    template: Path,
    tmp_path: Path,
    tiny_pipeline_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    blank_pictures: None,
) -> Path:
    """A copy of the trained project."""
    folder = Path(shutil.copytree(template, tmp_path / "project"))
    monkeypatch.chdir(folder)
    lighten(monkeypatch, tiny_pipeline_folder)
    return folder


def lighten(patch: pytest.MonkeyPatch, model_folder: Path) -> None:
    """Measure at few noise levels, and read the model once."""
    measure_few(patch)
    copies_in_place_of_loading(model_folder, patch)


def write_project(model_folder: Path) -> None:
    for split, prompts in PROMPTS.items():
        Path(f"{split}.txt").write_text("\n".join(prompts) + "\n")
    rows = []
    for split in ("train", "validation"):
        for prompt in PROMPTS[split]:
            for index in range(4):
                path = Path(f"clips/{split}-{prompt.replace(' ', '-')}-{index}.mp4")
                noise = rng.normal((3, 5, 16, 16), 0, prompt, 0, [index])[0]
                write_video(path, (0.3 * noise + (0.5 if index % 2 else -0.5)).clamp(-1, 1), 8)
                rows.append(LabelledVideo(path, prompt, {"light": float(index % 2), "calm": float(index < 2)}, split))
    write_manifest(Path("manifest.jsonl"), rows)
    common = {
        "version": 1,
        "seed": 0,
        "rollout": {"steps": 4},
        "data": {**DATA, "manifest": "manifest.jsonl", "prompts": {split: f"{split}.txt" for split in PROMPTS}},
        "evaluation": {"every": 2, "final_samples": 2, "prompts_per_round": 1},
    }
    model = {"model": str(model_folder)}
    policy = {**model, "adapter": {"rank": 2, "alpha": 2}}
    training = {"steps": 2, "batch": 2, "learning_rate": 1e-3, "save_every": 2}
    head = {"dimensions": ["light", "calm"], "blocks": [1], "inner": 8, "hidden": 8}
    steer = {"weights": {"light": 1.0}, "shape": "linear"}
    configs = {
        "reward": {
            "backbone": model,
            "reward": {"space": "latent", "head": head},
            "objective": {"name": "preference", "loss": "bce"},
            "evaluation": {"every": 2},
        },
        "pixel": {
            "backbone": model,
            "reward": {"space": "pixel", "head": {"dimensions": ["light", "calm"], "hidden": 8}},
            "objective": {"name": "preference", "loss": "bce"},
            "evaluation": {"every": 2},
        },
        "prfl": {
            "backbone": policy,
            "reward": {"space": "latent", "path": "${stages.reward.run}/reward", **steer},
            "objective": {"name": "prfl", "sft": {"every": 1}},
        },
        "vader": {
            "backbone": policy,
            "reward": {"space": "pixel", "path": "${stages.pixel.run}/reward", **steer},
            "objective": {"name": "vader", "frames": "one", "sft": {"every": 1}},
        },
        "full": {"backbone": {**model, "train": "full"}, "objective": {"name": "sft"}},
    }
    for name, own in configs.items():
        trackers = {} if name == "prfl" else {"trackers": []}  # the others, of which one draws, take their time
        whole = {**common, "run": f"runs/{name}", "training": training | trackers, **own}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(whole))
    Path("story.yaml").write_text(yaml.safe_dump({"version": 1, "stages": ["reward.yaml", "prfl.yaml"]}))


def metrics(run: str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_story_from_labels_to_report(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "story.yaml"]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "adapter on 24 layers of 3 blocks" in shown
    assert shown.count("does not rank clearly better than chance") >= 2, "said when it is trained and when followed"
    files = {"README.md", "config.json", "reward.safetensors", "prfl.json"}
    assert {path.name for path in Path("runs/reward/reward").iterdir()} == files
    card = json.loads(Path("runs/reward/reward/config.json").read_text())["card"]
    assert card["frames"] == [5, 5] and card["accuracy"]["light"], "the card of a saved reward says how good it is"
    for run in ("runs/reward", "runs/prfl"):
        page = Path(run, "report.html").read_text()
        assert "http://" not in page and "https://" not in page, "the report is self-contained"
    results = json.loads(Path("runs/prfl/samples/final/results.json").read_text())
    assert set(results["outcomes"]) == {"base", "policy"}
    steps = [record for record in metrics("runs/prfl") if "reward" in record]
    assert len(steps) == 2 and all(record["gradient_norm"] > 0 for record in steps)


@pytest.mark.slow
def test_pixel_reward_steers_by_vader(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "vader.yaml"]) == 0, capsys.readouterr().err
    assert Path("runs/vader/policy.safetensors").is_file()


@pytest.mark.slow
def test_aesthetic_score_steers_by_vader(project: Path, capsys: pytest.CaptureFixture) -> None:
    """From the files that a user has; CLIP and MLP are of the real classes, small and random."""
    tiny_clip().save_pretrained("clip")
    torch.save(tiny_mlp().state_dict(), "mlp.pth")
    reward = "reward={space: pixel, aesthetic: {clip: clip, mlp: mlp.pth}, target: 10.0}"
    assert cli.main(["train", "vader.yaml", reward, "run=runs/aesthetic"]) == 0, capsys.readouterr().err
    steps = [record for record in metrics("runs/aesthetic") if "gradient_norm" in record]
    assert len(steps) == 2 and all(record["gradient_norm"] > 0 for record in steps)
    rounds = [record for record in metrics("runs/aesthetic") if record["phase"] == "validation"]
    assert rounds and all("validation/reward/aesthetic" in record for record in rounds)


def test_sample_compares_the_policy_with_its_base(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["sample", "prfl.yaml", "run=runs/none"]) == 2
    assert "there is no trained policy" in capsys.readouterr().err
    assert cli.main(["sample", "prfl.yaml", "--compare-base"]) == 0, capsys.readouterr().err
    folder = Path("runs/prfl/samples/sampled")
    assert len(list((folder / "videos").glob("*.mp4"))) == 2
    page = (folder / "index.html").read_text()
    assert page.count("<video ") == 2 and "a green circle" in page and "https://" not in page
    with av.open(str(folder / "grid.mp4")) as grid:
        stream = grid.streams.video[0]
        assert (stream.height, stream.width) == (192, 384) and stream.frames == 5, "base and policy side by side"

    first = json.loads(Path("runs/prfl/samples/final/results.json").read_text())
    Path("runs/prfl").rename("runs/moved")
    Path("runs/moved/samples/final/results.json").unlink()
    assert cli.main(["eval", "--run", "runs/moved"]) == 0, capsys.readouterr().err
    again = json.loads(Path("runs/moved/samples/final/results.json").read_text())
    assert again["rows"] == first["rows"], "a run's folder is enough, also a moved one, to measure what training did"
    assert not Path("runs/prfl").exists()
    assert cli.main(["eval", "--run", "runs/moved", "evaluation.final_samples=0"]) == 2
    assert "evaluation.final_samples=64" in capsys.readouterr().err


def test_eval_measures_a_saved_head(trained: Path, capsys: pytest.CaptureFixture) -> None:
    Path("runs/reward/reward_eval.json").unlink()
    assert cli.main(["eval", "--run", "runs"]) == 2
    assert "there is no config.yaml in it" in capsys.readouterr().err
    assert cli.main(["eval", "--run", "runs/reward"]) == 0, capsys.readouterr().err
    rows = json.loads(Path("runs/reward/reward_eval.json").read_text())["rows"]
    assert {row["level"]["kind"] for row in rows} == {"bin", "point", "sampler"}


@pytest.mark.slow
def test_eval_compares_rewards_on_other_clips(trained: Path, capsys: pytest.CaptureFixture) -> None:
    """A latent and a pixel reward side by side, on a manifest that neither was trained on."""
    other = Path("other")
    rows = []
    for index in range(4):
        path = other / f"{index}.mp4"
        write_video(path, torch.full((3, 5, 16, 16), 0.2 * index - 0.4), 8)
        rows.append(LabelledVideo(path, "a yellow circle", {"light": float(index > 1), "calm": 1.0}))
    # Whatever split a row names, it is held out here.
    rows[:] = [replace(row, split="test") for row in rows]
    write_manifest(other / "manifest.jsonl", rows)
    heads = ["--head", "latent=runs/reward/reward", "--head", "pixel=runs/pixel/reward"]
    report = Path("runs/reward/report.html")
    before = report.read_text()
    assert cli.main(["eval", "reward.yaml", *heads, "--manifest", "other/manifest.jsonl"]) == 0, capsys.readouterr().err
    rows = json.loads(Path("runs/reward/reward_eval-other.json").read_text())["rows"]
    assert {row["scorer"] for row in rows} == {"latent", "pixel"} and all(row["accuracy_ties"] for row in rows)
    shown, after = capsys.readouterr().out, report.read_text()
    assert "latent" in shown and "pixel" in shown, "the accuracies are printed"
    for measure in MEASURES.values():
        assert after.count(measure.title) > before.count(measure.title), "every measure is in the report"
    assert cli.main(["eval", "reward.yaml", "--head", "a=runs/reward/reward", "--head", "a=runs/pixel/reward"]) == 2
    assert "two heads are called 'a'" in capsys.readouterr().err
    pictures = {path.name for path in Path("runs/reward").glob("reward_eval-other*.png")}
    assert pictures == {f"reward_eval-other{end}.png" for end in ("", ".ties", ".auc", ".calibration")}
    # A config that names no clips of its own will do: then no tie is known of.
    alone = ["eval", "prfl.yaml", "data.manifest=null", "objective.sft=null", "run=runs/alone"]
    assert cli.main([*alone, *heads, "--manifest", "other/manifest.jsonl"]) == 0, capsys.readouterr().err
    assert Path("runs/alone/reward_eval-other.json").is_file()


def test_clips_are_not_cut_from_clips(project: Path, capsys: pytest.CaptureFixture) -> None:
    """``videos: .`` above the cache and the runs: three commands find the same videos."""
    generator = "data.generator={name: video_clips, videos: ., kinds: [noise]}"
    for _ in range(3):
        arguments = ["cache", "full.yaml", "data.manifest=null", generator]
        assert cli.main(arguments) == 0, capsys.readouterr().err
    (made,) = Path("cache").glob("video_clips-*")
    assert len(read_manifest(made / "clips.jsonl")) == len(list(Path("clips").glob("*.mp4"))) == 12
    assert (made / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")


def test_full_fine_tuning_saves_a_transformer_for_diffusers(
    project: Path, tiny_pipeline_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    from diffusers import WanTransformer3DModel

    assert cli.main(["train", "full.yaml"]) == 0
    trained = WanTransformer3DModel.from_pretrained("runs/full/transformer").state_dict()
    base = WanTransformer3DModel.from_pretrained(tiny_pipeline_folder / "transformer").state_dict()
    assert any(not torch.equal(trained[name], base[name]) for name in base)
    assert cli.main(["sample", "full.yaml"]) == 0
    # The base would be the policy itself.
    assert cli.main(["sample", "full.yaml", "--compare-base"]) == 2
    assert "there is no base left" in capsys.readouterr().err
    assert cli.main(["sample", "reward.yaml"]) == 2
    assert "--per-prompt 4" in capsys.readouterr().err


@pytest.mark.parametrize("stage", slow_unless("full".__eq__, ["reward", "prfl", "full"]))
def test_a_half_precision_model_trains_float32_weights(
    trained: Path, stage: str, capsys: pytest.CaptureFixture
) -> None:
    half = ["backbone.dtype=bfloat16", "run=runs/half"]
    assert cli.main(["train", f"{stage}.yaml", *half]) == 0, capsys.readouterr().err
    steps = [record for record in metrics("runs/half") if "gradient_norm" in record]
    assert len(steps) == 2 and all(0 < record["gradient_norm"] < float("inf") for record in steps)


def test_rows_that_are_all_for_training_train_a_reward(project: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [row for row in read_manifest("manifest.jsonl") if row.split == "train"]
    write_manifest(Path("manifest.jsonl"), rows)
    assert cli.main(["train", "reward.yaml", "evaluation.every=0"]) == 0, capsys.readouterr().err
    assert Path("runs/reward/reward/reward.safetensors").is_file()
    assert "never measured on held-out labels: light" in capsys.readouterr().out


def test_held_out_prompts_are_not_trained_on(project: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [replace(row, split=None) for row in read_manifest("manifest.jsonl")]
    write_manifest(Path("manifest.jsonl"), rows)
    assert cli.main(["train", "reward.yaml", "evaluation.every=0"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "4 rows for training have a prompt of data.prompts.validation" in shown and "manifest.jsonl" in shown


ALONE = ["run=runs/alone", "data.manifest=null", "objective.sft=null", "reward.path=runs/reward/reward"]


def test_a_cache_of_no_clips_has_the_prompts(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["cache", "prfl.yaml", *ALONE]) == 0, capsys.readouterr().err
    assert "5 prompts encoded" in capsys.readouterr().out, "four, and the empty one"
    assert len(list(Path("cache/prompts").iterdir())) == 5
    assert cli.main(["cache", "prfl.yaml", *ALONE]) == 0
    assert "0 prompts encoded" in capsys.readouterr().out


@pytest.mark.slow
def test_a_second_start_needs_no_text_encoder(
    trained: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It, or a command on the finished run, reads what the first one wrote; the run goes on bit for bit."""
    monkeypatch.setattr(backbone_factory, "load_backbone", load_backbone)  # as a process that has read nothing
    shutil.rmtree("cache")
    whole = ["training.steps=4", "evaluation.every=2", "data.cache=other"]
    assert cli.main(["train", "prfl.yaml", *ALONE, "run=runs/whole", *whole]) == 0, capsys.readouterr().err
    assert cli.main(["train", "prfl.yaml", *ALONE]) == 0, capsys.readouterr().err

    def touched(self: Source, kind: type, dtype: torch.dtype) -> None:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(Source, "load_text", touched)
    assert cli.main(["train", "prfl.yaml", *ALONE, "training.steps=4"]) == 0, capsys.readouterr().err
    assert cli.main(["sample", "prfl.yaml", *ALONE]) == cli.main(["eval", "prfl.yaml", *ALONE]) == 0
    one, two = (load_file(f"runs/{run}/policy.safetensors") for run in ("alone", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    Path("test.txt").write_text("a red square\na new prompt\n")
    with pytest.raises(AssertionError, match="was loaded"):
        cli.main(["train", "prfl.yaml", *ALONE])


def test_a_short_run_encodes_the_prompts_that_it_meets(
    project: Path, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the empty one; a longer run goes on bit for bit with more of them."""
    words = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle"), ("left", "right", "up", "down")
    Path("train.txt").write_text("".join(f"a {' '.join(some)}\n" for some in product(*words)))
    head = RewardHead(24, ["light", "calm"], inner=8, hidden=8)
    LatentReward(head, load_backbone(tiny_pipeline_folder), [1]).save_pretrained("runs/reward/reward")
    alone = ["train", "prfl.yaml", *ALONE, "evaluation.every=0", "evaluation.final_samples=0"]
    assert cli.main([*alone, "data.cache=few", "training.steps=1"]) == 0
    assert len(list(Path("few/prompts").iterdir())) == 2 + 1, "a batch of two"
    assert cli.main([*alone, "data.cache=few", "training.steps=3"]) == 0
    assert len(list(Path("few/prompts").iterdir())) == 6 + 1
    assert cli.main([*alone, "data.cache=new", "training.steps=3", "run=runs/whole"]) == 0
    one, two = (load_file(f"runs/{run}/policy.safetensors") for run in ("alone", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_cache_is_filled_once(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["cache", "reward.yaml"]) == 0
    assert "12 videos encoded" in capsys.readouterr().out
    assert cli.main(["cache", "reward.yaml"]) == 0
    assert "0 videos encoded, 12 found in the cache" in capsys.readouterr().out


def test_a_stopped_story_goes_on(trained: Path) -> None:
    """Finished stages are not trained again."""
    before = Path("runs/reward/metrics.jsonl").read_text()
    assert cli.main(["train", "story.yaml"]) == 0
    after = Path("runs/reward/metrics.jsonl").read_text()
    assert [line for line in after.splitlines() if '"loss"' in line] == [
        line for line in before.splitlines() if '"loss"' in line
    ]
