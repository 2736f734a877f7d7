"""``prfl sample`` with a reward that chooses, from the command line to the page, on a random tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prfl import cli
from prfl.backbone import load_backbone
from prfl.config import load_config
from prfl.factory.backbone import POLICY, build_architecture, build_backbone
from prfl.factory.policy import load_checkpoint_policy, scale_adapter
from prfl.factory.steering import build_looks
from prfl.reward import LatentReward, RewardHead
from prfl.steering.process import Look
from prfl.utils.errors import PrflError
from tests.runs.test_commands import project  # noqa: F401

pytestmark = pytest.mark.usefixtures("project")


@pytest.fixture
def head(tiny_pipeline_folder: Path, project: Path) -> None:  # noqa: F811
    """A random head where the configs look for a trained one."""
    torch.manual_seed(0)
    head = RewardHead(24, ["light", "calm"], inner=8, hidden=8)
    LatentReward(head, load_backbone(tiny_pipeline_folder), [1]).save_pretrained("runs/reward/reward")


def results(run: str) -> tuple[Path, dict]:
    (folder,) = Path(run, "samples").glob("steered-*")
    return folder, json.loads((folder / "results.json").read_text())


def sample(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert cli.main(["sample", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_head_of_a_reward_config_chooses_among_the_bases_chains(head: None, capsys: pytest.CaptureFixture) -> None:
    sample(capsys, "reward.yaml", "--best-of", "4", "--decide-at", "0.5", "--prompt", "a red circle", "--prompt", "up")
    folder, written = results("runs/reward")
    assert written["generator"] == "base" and [video["prompt"] for video in written["videos"]] == ["a red circle", "up"]
    assert written["calls"] == {"policy": 4 * 2 + 2, "reward": 4 * 2 / 3, "decodes": 0}
    for video in written["videos"]:
        (chosen,) = video["kept"]
        scores = {each["origin"]: each["trace"][-1][1] for each in (*video["rejected"], chosen)}
        assert sorted(scores) == [0, 1, 2, 3] and scores[chosen["origin"]] == max(scores.values())
        assert len(set(scores.values())) == 4, "the head tells the chains apart"
        assert len([each for each in video["rejected"] if "file" in each]) == 3
    page = (folder / "index.html").read_text()
    assert page.count("<video ") == 8 and page.count("<svg ") == 2 and "https://" not in page
    assert "network calls a video" in page and "saved" in page


@pytest.mark.slow
def test_what_is_there_is_not_drawn_again(head: None, capsys: pytest.CaptureFixture) -> None:
    arguments = ["reward.yaml", "--best-of", "2", "--prompt", "a red circle"]
    sample(capsys, *arguments)
    folder, _ = results("runs/reward")
    (record,) = (folder / "records").iterdir()
    changed = json.loads(record.read_text()) | {"log": {"kept": [1.0]}}
    record.write_text(json.dumps(changed))
    sample(capsys, *arguments, "--prompt", "a blue square")
    _, written = results("runs/reward")
    assert [video["log"] for video in written["videos"]] == [{"kept": [1.0]}, {}]
    record.write_text('{"kept": [')  # a crash's
    sample(capsys, *arguments)
    assert json.loads(record.read_text())["log"] == {}, "a damaged record is drawn again"
    sample(capsys, *arguments, "--seed", "3")
    assert len(list(Path("runs/reward/samples").glob("steered-*"))) == 2, "other noise is another folder"


def test_steering_of_the_config_and_of_the_command_line(head: None, capsys: pytest.CaptureFixture) -> None:
    arguments = ["reward.yaml", "--prompt", "up", "steering={name: best_of, chains: 3, keep: 2, decide_at: [1.0]}"]
    sample(capsys, *arguments)
    _, written = results("runs/reward")
    assert written["steering"]["chains"] == 3 and len(written["videos"][0]["kept"]) == 2
    assert cli.main(["sample", *arguments, "--best-of", "1"]) == 2
    assert "steering.keep: there are only 1 chains" in capsys.readouterr().err
    assert cli.main(["sample", *arguments, "steering.decide_at=[0.5]", "steering.final_levels=[0.5]"]) == 2
    said = "steering.final_levels: best_of, whose last look is before the end, does not read it"
    assert said in capsys.readouterr().err
    assert cli.main(["sample", *arguments, "--method", "best"]) == 2
    assert "'best' is none of" in capsys.readouterr().err
    assert cli.main(["sample", *arguments, "--budget", "2"]) == 2
    assert "too few" in capsys.readouterr().err
    assert cli.main(["sample", "reward.yaml"]) == 2
    assert "--best-of 8" in capsys.readouterr().err
    assert cli.main(["sample", *arguments, "--compare-base"]) == 2
    assert "--compare-base" in capsys.readouterr().err
    assert cli.main(["sample", "reward.yaml", "--per-prompt", "2", "--best-of", "2"]) == 2
    assert "--best-of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_policy_a_checkpoint_of_it_and_a_share_of_its_update(head: None, capsys: pytest.CaptureFixture) -> None:
    """A LoRA scaled to 0 is the base; each of the weights that can be drawn has a folder of its own."""
    assert cli.main(["train", "prfl.yaml", "training.save_every=1", "training.keep=2"]) == 0, capsys.readouterr().err
    arguments = ["prfl.yaml", "--best-of", "2", "--prompt", "a red circle"]
    drawn = {}
    for name, options in {
        "policy": [],
        "half": ["--lora-scale", "0.5"],
        "none": ["--lora-scale", "0"],
        "base": ["--base"],
        "checkpoint": ["--checkpoint", "step-000001"],
    }.items():
        before = set(Path("runs/prfl/samples").glob("steered-*"))
        sample(capsys, *arguments, *options)
        (folder,) = set(Path("runs/prfl/samples").glob("steered-*")) - before
        written = json.loads((folder / "results.json").read_text())
        assert written["generator"] == ("base" if name == "base" else "policy")
        drawn[name] = [each["trace"] for each in (*written["videos"][0]["kept"], *written["videos"][0]["rejected"])]
    assert drawn["none"] == drawn["base"]
    assert len({json.dumps(traces) for traces in drawn.values()}) == 4, "policy, half, base and checkpoint differ"
    assert cli.main(["sample", *arguments, "--checkpoint", "step-7"]) == 2
    assert "those that there are: step-000001, step-000002" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoints_average_is_what_is_drawn(head: None, capsys: pytest.CaptureFixture) -> None:
    ema = ["training.ema_decay=0.5", "training.steps=2", "training.save_every=2"]
    assert cli.main(["train", "prfl.yaml", *ema]) == 0, capsys.readouterr().err
    config = load_config("prfl.yaml", ema)
    model = build_backbone(config)
    load_checkpoint_policy(config, model, "step-000002")
    average = load_file("runs/prfl/checkpoints/step-000002/ema.safetensors")
    plain = load_file("runs/prfl/checkpoints/step-000002/weights.safetensors")
    for name, parameter in model.parameters(POLICY).items():
        assert torch.equal(parameter, average[name])
    assert any(not torch.equal(average[name], plain[name]) for name in average)
    scale_adapter(config, model, 0.5)
    for name, parameter in model.parameters(POLICY).items():
        torch.testing.assert_close(parameter, average[name] * (0.5 if "lora_B" in name else 1.0))
    save_file({name: value * 2 for name, value in average.items()}, "runs/prfl/checkpoints/step-000002/ema.safetensors")
    assert cli.main(["sample", "prfl.yaml", *ema, "--checkpoint", "step-000002"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_plain_samples_take_a_prompt_a_seed_and_the_base(head: None, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "prfl.yaml"]) == 0, capsys.readouterr().err
    sample(capsys, "prfl.yaml", "--prompt", "up", "--seed", "3", "--base")
    written = json.loads(Path("runs/prfl/samples/sampled/results.json").read_text())
    assert set(written["outcomes"]) == {"base"} and {row["prompt"] for row in written["rows"]} == {"up"}
    assert written["outcomes"]["base"]["settings"]["seed"] == 3 and "policy" not in written


def test_levels_for_rewards_that_read_no_latents(head: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("reward.yaml", ["steering={name: fk, final_levels: [0.5]}"])
    monkeypatch.setattr("prfl.factory.steering._looks", lambda *_: [Look(lambda *_: torch.zeros(1), clean=True)])
    with pytest.raises(PrflError, match="steering.final_levels: none of the rewards that steer reads latents"):
        build_looks(config, build_architecture(config))
