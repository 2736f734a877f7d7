"""Reward hacking is seen on held-out prompts: by rounds made up here, and in a run with a reward that can be hacked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from prfl import cli
from prfl.backbone import load_backbone
from prfl.evaluation.hacking import find_alarms, rounds
from prfl.evaluation.policy_eval import Outcome, read_outcome, write_results
from prfl.reward import LatentReward, RewardHead
from prfl.rollout.sampling import SamplingSettings, jobs
from tests.models import copies_in_place_of_loading

SETTINGS = SamplingSettings(frames=5, height=16, width=16, steps=2, batch=4)


def measured(prompts: int = 6, noise: float = 0.0, **means: float) -> Outcome:
    """A round whose samples differ; ``noise`` is what each sample changes by, for reasons of its own, in this round."""
    names, indices = jobs([f"prompt {n}" for n in range(prompts)], 2)
    draw = torch.Generator().manual_seed(0)
    offset = torch.randn(len(names), generator=draw)
    change = noise * torch.randn(len(names), generator=draw)
    scores = {key.replace("__", "/"): mean + offset + change for key, mean in means.items()}
    spread = {prompt: 0.3 for prompt in dict.fromkeys(names)}
    return Outcome("policy", SETTINGS, names, indices, scores, spread, torch.zeros(1, 3, 5, 16, 16), 1.0)


def test_only_a_rise_with_a_fall_is_hacking():
    start = measured(reward__total=0.0, held_out__total=0.0, motion=1.0)
    better = measured(reward__total=0.5, held_out__total=0.4, motion=0.95)
    worse = measured(reward__total=0.9, held_out__total=0.1, motion=0.95)
    lost = measured(reward__total=-0.2, held_out__total=-0.4, motion=0.2)
    assert (
        find_alarms([(0, start)])
        == find_alarms([(0, start), (10, better)])
        == find_alarms([(0, start), (10, lost)])
        == []
    )
    (fall,) = find_alarms([(0, start), (10, better), (20, worse)])
    assert (fall.measure, fall.since) == ("held_out/total", 10)  # from its best round, though it is above the start
    assert fall.change.value == pytest.approx(-0.3, abs=1e-5) and fall.rise.value == pytest.approx(0.4, abs=1e-5)
    assert "since step 10 the trained reward rose by 0.400" in str(fall)


def test_a_fall_within_the_noise_and_a_little_less_motion_are_none():
    start = measured(reward__total=0.0, held_out__total=0.0, motion=1.0)
    noisy = measured(noise=2.0, reward__total=9.0, held_out__total=-0.2, motion=0.95)
    assert find_alarms([(0, start), (10, noisy)]) == []
    still = measured(reward__total=0.5, held_out__total=0.0, motion=0.5)
    assert [fall.measure for fall in find_alarms([(0, start), (10, still)])] == ["motion"]
    few = [replace(outcome, prompts=["one prompt"] * 12) for outcome in (start, still)]
    assert find_alarms([(0, few[0]), (10, few[1])]) == [], "an interval needs prompts"


def test_rounds_of_a_folder_are_read_as_far_as_they_measured_the_same(tmp_path):
    start, later = measured(reward__total=0.0), measured(reward__total=1.0)
    other = measured(prompts=5, reward__total=0.0)
    steps = {0: start, 5: other, 10: later, 20: later}
    for step, outcome in steps.items():
        write_results(tmp_path / f"step-{step:06d}", [outcome], 8.0)
    assert [step for step, _ in rounds(tmp_path, 10)] == [0, 10]  # not of a later step: that was before a resume
    again = read_outcome(tmp_path / "step-000010" / "results.json", "policy")
    torch.testing.assert_close(again.scores["reward/total"], later.scores["reward/total"], rtol=0, atol=1e-6)
    assert again.spread == later.spread and again.settings == later.settings


def planted_project(pipeline: Path) -> None:
    """Two saved rewards of a tiny model and a config: ``size`` is trained on, ``natural`` is held out."""
    model = load_backbone(pipeline)
    for name in ("size", "natural"):
        LatentReward(
            RewardHead(model.facts.widths[0], [name], blocks=1, inner=8, hidden=8), model, [0]
        ).save_pretrained(name)
    prompts = {"train": ["a red circle", "a blue square"], "validation": ["a", "a circle", "red", "a square moves up"]}
    for split, captions in prompts.items():
        Path(f"{split}.txt").write_text("\n".join(captions))
    adapter = {"rank": 4, "alpha": 4, "targets": ["to_q", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]}
    config = {
        "version": 1,
        "run": "run",
        "seed": 0,
        "backbone": {"model": str(pipeline), "adapter": adapter},
        "data": {
            "prompts": {split: f"{split}.txt" for split in prompts},
            "cache": "cache", "frames": 5, "height": 16, "width": 16, "fps": 8,
        },
        "reward": {"space": "latent", "path": "size", "shape": "linear", "scale": 1.0},
        "rollout": {"steps": 4},
        "objective": {"name": "prfl"},
        "training": {"steps": 16, "batch": 2, "learning_rate": 2e-2, "save_every": 4, "keep": 9, "trackers": []},
        "evaluation": {"every": 4, "held_out_reward": "natural"},
    }  # fmt: skip
    Path("hack.yaml").write_text(yaml.safe_dump(config))


def size_or_natural(self: LatentReward, latents, sigma, condition):
    """The trained reward grows with the size of the latents, without end; what it should stand for has an optimum."""
    size = latents.float().square().mean((1, 2, 3, 4)).sqrt()
    return {name: {"size": size, "natural": -((size - 1.4) ** 2)}[name] for name in self.dimensions}


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pictures")
def test_a_planted_hackable_reward_is_seen_and_ends_the_run(tiny_pipeline_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copies_in_place_of_loading(tiny_pipeline_folder, monkeypatch)
    planted_project(tiny_pipeline_folder)
    monkeypatch.setattr(LatentReward, "logits", size_or_natural)
    assert cli.main(["train", "hack.yaml"]) == 0
    captured = capsys.readouterr()
    watched = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    watched = [record for record in watched if "validation/hacking" in record]
    assert [record["step"] for record in watched] == [0, 4, 8, 12, 16]
    trained, held_out = (
        [record[key] for record in watched] for key in ("validation/reward/total", "validation/held_out/total")
    )
    assert trained == sorted(trained) and held_out[1] > held_out[0] and held_out[-1] < max(held_out)
    first = next(record["step"] for record in watched if record["validation/hacking"])
    assert first > 4, "no warning while both rise"
    assert "warning: reward hacking?" in captured.out and "held_out/total fell from" in captured.out
    assert {f"validation/{name}" for name in ("motion", "diversity", "distance")} <= watched[-1].keys()
    distances = [record["validation/distance"] for record in watched]
    assert distances[0] == 0 and distances[-1] > distances[1] > 0
    assert len(list(Path("run/samples/step-000016/videos").glob("*.mp4"))) == 4

    assert cli.main(["train", "hack.yaml", "run=stopped", "evaluation.stop_on_hacking=true"]) == 2
    error = capsys.readouterr().err
    assert f"reward hacking at step {first}" in error and "take a checkpoint of step" in error
    assert max(int(path.name[5:]) for path in Path("stopped/checkpoints").iterdir()) == first
    assert Path("stopped/report.html").exists() and not Path("stopped/policy.safetensors").exists()
    # Resumed, it is still hacking: the earlier rounds are read again.
    assert cli.main(["train", "hack.yaml", "run=stopped", "evaluation.stop_on_hacking=true"]) == 2
    assert f"reward hacking at step {first}" in capsys.readouterr().err
