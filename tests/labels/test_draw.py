"""``prfl sample --per-prompt``: videos, an unlabelled manifest and the page; a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prfl import cli
from prfl.data.manifest import LabelledVideo, read_manifest
from prfl.data.video import read_video
from prfl.export.run import run_config
from prfl.factory.backbone import POLICY, build_backbone
from prfl.factory.data import video_size
from prfl.factory.evaluation import sampling_settings
from prfl.factory.policy import load_policy
from prfl.rollout.sampling import decode_all, sample
from prfl.utils.files import written_by_prfl
from prfl.utils.video_size import VideoSize


def test_from_videos_to_labels(tiny_run: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    run = tiny_run()
    arguments = ["sample", str(run / "config.yaml"), "--per-prompt", "3", "--prompts", "2", "--dimensions", "motion"]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    (folder,) = (run / "samples").glob("label-*")
    assert written_by_prfl(folder), "no clips are ever cut from samples"
    assert str(folder / "label.html") in capsys.readouterr().out.replace("\n", "")
    rows = read_manifest(folder / "manifest.jsonl")
    assert [(row.prompt, row.split) for row in rows if isinstance(row, LabelledVideo)] == (
        [("a red circle", "train")] * 3 + [("a blue square", "train")] * 3 + [("a green circle", "validation")] * 3
    )
    assert all(isinstance(row, LabelledVideo) and row.label == {} for row in rows)

    config = run_config(run)
    model = build_backbone(config)
    load_policy(config, model)
    drawn = sample(model, ["a blue square"], [1], sampling_settings(config), adapter=POLICY)
    file = rows[4].video
    assert (read_video(file, video_size(config.data)) - decode_all(model, drawn)[0]).abs().mean() < 0.02

    before = {path: path.stat().st_mtime_ns for path in (folder / "videos").iterdir()}
    file.unlink()
    assert cli.main(arguments) == 0
    again = {path: path.stat().st_mtime_ns for path in (folder / "videos").iterdir()}
    redrawn = {path for path in before if before[path] != again[path]}
    assert {path.name.rsplit("-", 1)[0] for path in redrawn} == {file.name.rsplit("-", 1)[0]}, "that prompt's only"

    (run / "policy.safetensors").unlink()
    assert cli.main(arguments) == 2
    assert "there is no trained policy" in capsys.readouterr().err


def test_another_policy_gets_another_folder(tiny_run: Callable[..., Path]) -> None:
    """Or labels would silently belong to other videos."""
    run = tiny_run()
    arguments = ["sample", str(run / "config.yaml"), "--per-prompt", "2", "--prompts", "1"]
    assert cli.main(arguments) == 0
    from safetensors.torch import load_file, save_file

    tensors = load_file(run / "policy.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, run / "policy.safetensors")
    assert cli.main(arguments) == 0
    first, second = sorted((run / "samples").glob("label-*"))
    names = [path.name for path in sorted((first / "videos").iterdir())]
    assert names == [path.name for path in sorted((second / "videos").iterdir())]
    videos = [read_video(folder / "videos" / names[0], VideoSize(5, 16, 16, 8)) for folder in (first, second)]
    assert not torch.equal(*videos)


def test_a_reward_to_be_trained_gets_the_base_s_videos(tiny_run: Callable[..., Path], capsys) -> None:
    run = tiny_run()
    config = run_config(run).model_dump(mode="json")
    config |= {"reward": {"space": "latent", "head": {"dimensions": ["light", "calm"], "blocks": [1]}}}
    config |= {"objective": {"name": "preference", "loss": "bradley_terry"}}
    config["backbone"]["adapter"] = None
    config["evaluation"] = {"every": 0, "seed": 3}
    config["data"]["manifest"] = str(run / "preferences.jsonl")  # which these labels will make
    Path(run / "reward.yaml").write_text(json.dumps(config))
    assert cli.main(["sample", str(run / "reward.yaml"), "--per-prompt", "2"]) == 0, capsys.readouterr().err
    (page,) = (run / "samples").glob("label-*/label.html")
    assert '"questions": {"light": "Which is better: light?", "calm": ' in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--per-prompt", "1"], "leaves nothing to compare"),
        (["--per-prompt", "2", "--prompts", "0"], "leave nothing to draw"),
        (["--prompts", "3"], "they need --per-prompt"),
        (["--per-prompt", "2", "--compare-base"], "the videos of one model"),
    ],
)
def test_options_that_make_no_sense(tiny_run: Callable[..., Path], options: list[str], message: str, capsys) -> None:
    assert cli.main(["sample", str(tiny_run() / "config.yaml"), *options]) == 2
    assert message in capsys.readouterr().err
