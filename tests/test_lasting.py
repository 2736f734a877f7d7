"""What keeps a gain from being hacked away, from end to end: several rewards, the best round, samples of a policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prfl import build, cli
from prfl.config import load_config
from prfl.errors import PrflError
from prfl.forecast import missing_inputs, predict_memory
from prfl.forecast.work import REWARD, count_work
from prfl.reward import LatentReward, RewardAdapter, RewardEnsemble, RewardHead
from tests.test_commands import metrics, project  # noqa: F401

TWO = "reward.path=[runs/one/reward, runs/two/reward]"
ALONE = ["data.manifest=null", "objective.sft=null", "evaluation.final_samples=0"]


def save_reward(name: str, seed: int, dimensions: tuple[str, ...] = ("light", "calm"), adapter: bool = False) -> None:
    model = build.backbone(load_config("reward.yaml"))
    torch.manual_seed(seed)
    head = RewardHead(model.width, dimensions, inner=8, hidden=8)
    own = RewardAdapter(1, 1.0, ("to_q",), seed=seed) if adapter else None
    LatentReward(head, model, [1], adapter=own).save_pretrained(f"runs/{name}/reward")


def save_two() -> None:
    save_reward("one", 0)
    save_reward("two", 1, adapter=True)


def test_several_rewards_steer_as_one(project: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    config = load_config("prfl.yaml", [TWO, *ALONE])
    lines = missing_inputs(config)
    assert len(lines) == 2 and all("reward.path" in line for line in lines) and "runs/two/reward" in lines[1]
    before = predict_memory(config, build.architecture(config))
    assert before.assumed.startswith("2 frozen reward heads")
    save_two()
    assert cli.main(["train", "prfl.yaml", TWO, "reward.uncertainty_weight=1.5", *ALONE]) == 0, capsys.readouterr().err
    steps = [record for record in metrics("runs/prfl") if "gradient_norm" in record]
    assert len(steps) == 2 and all(record["gradient_norm"] > 0 < record["reward/uncertainty"] for record in steps)
    rounds = [record for record in metrics("runs/prfl") if "motion" in record]
    assert rounds and all(record["reward/uncertainty"] > 0 for record in rounds)
    assert "reward/total" in rounds[0] and not missing_inputs(config)

    one = load_config("prfl.yaml", ["reward.path=runs/one/reward", *ALONE])
    reads = [{w.name: w.total for w in count_work(c, build.architecture(c))}[REWARD] for c in (one, config)]
    assert reads[1] == 4 * reads[0], "one reads once; two of which one has an adapter, twice each"
    memory = [predict_memory(c, build.architecture(c)) for c in (one, config)]
    weights = [{part.name: part.bytes for part in m.fixed}["reward weights"] for m in memory]
    peaks = [{part.name: part.bytes for part in m.phases}["reward: forward and backward"] for m in memory]
    assert weights[1] > 2 * weights[0] and peaks[1] < 1.6 * peaks[0], "never two passes' activations at once"

    # A reward that was trained again makes another run.
    capsys.readouterr()
    save_reward("one", 5)
    assert cli.main(["train", "prfl.yaml", TWO, "reward.uncertainty_weight=1.5", *ALONE, "training.steps=3"]) == 2
    assert "reward.path[0] (weights)" in capsys.readouterr().err


def test_rewards_that_do_not_go_together_are_refused(project: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    save_two()
    assert (
        cli.main(["train", "reward.yaml", "run=runs/three", "reward.head.dimensions=[light]", "evaluation.every=0"])
        == 0
    )
    config = load_config("prfl.yaml", [TWO, *ALONE, "reward.uncertainty_weight=0.5"])
    reward = build.trained_reward(config, build.backbone(config))
    assert isinstance(reward, RewardEnsemble) and reward.uncertainty_weight == 0.5
    assert [member.adapter and member.adapter.name for member in reward.members] == [None, "reward-1"]
    config = load_config("prfl.yaml", ["reward.path=[runs/one/reward, runs/three/reward]", *ALONE])
    with pytest.raises(PrflError, match=r"^reward\.path: .*different dimensions"):
        build.trained_reward(config, build.backbone(config))
    path = Path("runs/two/reward/config.json")
    saved = json.loads(path.read_text())
    saved["backbone"]["transformer_fingerprint"] = "of another"
    path.write_text(json.dumps(saved))
    config = load_config("prfl.yaml", [TWO, *ALONE])
    with pytest.raises(PrflError, match=r"^reward\.path\[1\]: runs/two/reward: the reward does not fit this backbone"):
        build.trained_reward(config, build.backbone(config))
    for override, fault in (
        ("reward.path=[a]", "reward.path"),
        ("reward.path=[a/b, a/b]", "a/b is named twice"),
        ("reward.uncertainty_weight=1.0", "one reward, with nobody to disagree with, does not read it"),
    ):
        with pytest.raises(PrflError, match=fault):
            load_config("prfl.yaml", [override, *ALONE])
    with pytest.raises(PrflError, match=r"evaluation\.held_out_reward: this is the reward that is trained on"):
        load_config("prfl.yaml", [TWO, *ALONE, "evaluation.held_out_reward=runs/two/reward"])
    with pytest.raises(PrflError, match=r"reward\.path"):
        load_config("vader.yaml", [TWO, *ALONE])
