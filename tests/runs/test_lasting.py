"""What keeps a gain from being hacked away, from end to end: several rewards, the best round, samples of a policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prfl import cli
from prfl.config import load_config
from prfl.estimate.memory import predict_memory
from prfl.estimate.missing_inputs import missing_inputs
from prfl.estimate.nfe import REWARD, count_nfe
from prfl.evaluation.policy_eval import write_results
from prfl.export.card import reward_text
from prfl.factory.backbone import build_architecture, build_backbone
from prfl.factory.policy import load_policy
from prfl.factory.reward import load_followed_reward
from prfl.reward import LatentReward, RewardAdapter, RewardEnsemble, RewardHead
from prfl.runs.early_stopping import BestPolicy
from prfl.training.run_folder import RunFolder
from prfl.utils.errors import PrflError
from tests.evaluation.test_hacking import measured, planted_project, size_or_natural
from tests.models import copies_in_place_of_loading
from tests.runs.test_commands import metrics, project  # noqa: F401

pytestmark = pytest.mark.usefixtures("blank_pictures")

TWO = "reward.path=[runs/one/reward, runs/two/reward]"
ALONE = ["data.manifest=null", "objective.sft=null", "evaluation.final_samples=0"]


def save_reward(name: str, seed: int, dimensions: tuple[str, ...] = ("light", "calm"), adapter: bool = False) -> None:
    model = build_backbone(load_config("reward.yaml"))
    torch.manual_seed(seed)
    head = RewardHead(model.facts.widths[0], dimensions, inner=8, hidden=8)
    own = RewardAdapter(1, 1.0, ("to_q",), seed=seed) if adapter else None
    LatentReward(head, model, [1], adapter=own).save_pretrained(f"runs/{name}/reward")


def save_two() -> None:
    save_reward("one", 0)
    save_reward("two", 1, adapter=True)


@pytest.mark.slow
def test_several_rewards_steer_as_one(project: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    config = load_config("prfl.yaml", [TWO, *ALONE])
    lines = missing_inputs(config)
    assert len(lines) == 2 and all("reward.path" in line for line in lines) and "runs/two/reward" in lines[1]
    before = predict_memory(config, build_architecture(config))
    assert before.assumed.startswith("2 frozen reward heads")
    save_two()
    assert cli.main(["train", "prfl.yaml", TWO, "reward.uncertainty_weight=1.5", *ALONE]) == 0, capsys.readouterr().err
    steps = [record for record in metrics("runs/prfl") if "gradient_norm" in record]
    assert len(steps) == 2 and all(record["gradient_norm"] > 0 < record["reward/uncertainty"] for record in steps)
    rounds = [record for record in metrics("runs/prfl") if record["phase"] == "validation"]
    assert rounds and all(record["validation/reward/uncertainty"] > 0 for record in rounds)
    assert "validation/reward/total" in rounds[0] and not missing_inputs(config)

    one = load_config("prfl.yaml", ["reward.path=runs/one/reward", *ALONE])
    reads = [{w.name: w.total for w in count_nfe(c, build_architecture(c))}[REWARD] for c in (one, config)]
    assert reads[1] == 4 * reads[0], "one reads once; two of which one has an adapter, twice each"
    memory = [predict_memory(c, build_architecture(c)) for c in (one, config)]
    weights = [{part.name: part.bytes for part in m.fixed}["reward weights"] for m in memory]
    peaks = [{part.name: part.bytes for part in m.phases}["reward: forward and backward"] for m in memory]
    assert weights[1] > 2 * weights[0] and peaks[1] < 1.6 * peaks[0], "never two passes' activations at once"

    text = reward_text(load_config("runs/prfl/config.yaml"))
    assert text.startswith("The mean of 2 latent rewards less 1.5 times the deviation between them (light x 1; sum, ")

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
    reward = load_followed_reward(config, build_backbone(config))
    assert isinstance(reward, RewardEnsemble) and reward.uncertainty_weight == 0.5
    assert [member.adapter and member.adapter.name for member in reward.members] == [None, "reward-1"]
    config = load_config("prfl.yaml", ["reward.path=[runs/one/reward, runs/three/reward]", *ALONE])
    with pytest.raises(PrflError, match=r"^reward\.path: .*different dimensions"):
        load_followed_reward(config, build_backbone(config))
    path = Path("runs/two/reward/config.json")
    saved = json.loads(path.read_text())
    saved["backbone"]["transformer_fingerprint"] = "of another"
    path.write_text(json.dumps(saved))
    config = load_config("prfl.yaml", [TWO, *ALONE])
    with pytest.raises(PrflError, match=r"^reward\.path\[1\]: runs/two/reward: the reward does not fit this backbone"):
        load_followed_reward(config, build_backbone(config))
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


KEPT = "validation/held_out/total"
KEEP = [f"evaluation.keep_best={KEPT}", "training.keep=1", "evaluation.samples_per_prompt=1"]


def bests(run: str) -> list[str]:
    return sorted(path.name for path in Path(run, "best").iterdir())


def held_out(run: str) -> dict[int, float]:
    return {record["step"]: record[KEPT] for record in metrics(run) if KEPT in record}


@pytest.mark.slow
def test_the_best_round_is_kept_and_patience_ends_the_run(tiny_pipeline_folder, tmp_path, monkeypatch, capsys) -> None:
    """On a planted reward whose held-out counterpart rises and then falls; stopped and gone on with it is the same."""
    monkeypatch.chdir(tmp_path)
    copies_in_place_of_loading(tiny_pipeline_folder, monkeypatch)
    planted_project(tiny_pipeline_folder)
    monkeypatch.setattr(LatentReward, "logits", size_or_natural)
    assert cli.main(["train", "hack.yaml", "run=whole", *KEEP]) == 0
    values = held_out("whole")
    best = max(values, key=lambda step: values[step])
    assert 0 < best < 16, "it rises and falls"
    told = [record for record in metrics("whole") if record["phase"] == "validation"][-1]
    assert told["validation/kept/step"] == best
    assert told["validation/kept/held_out/total"] == pytest.approx(values[best], abs=1e-5)
    assert f"kept: the policy of step {best}, validation/held_out/total" in capsys.readouterr().out
    kept = load_file("whole/policy.safetensors")
    last = load_file("whole/checkpoints/step-000016/weights.safetensors")
    assert bests("whole") == [f"step-{best:06d}"]
    written = load_file(f"whole/best/{bests('whole')[0]}/policy.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in written.items())
    assert any(not torch.equal(kept[name], value) for name, value in last.items()), "the last step's weights go on"
    assert len(kept) == len(last)

    # With patience it ends where two rounds were no better, and again when it is started again.
    assert cli.main(["train", "hack.yaml", "run=short", *KEEP, "evaluation.patience=1"]) == 0
    ended = best + 4
    for _ in range(2):
        assert list(held_out("short").items()) == [item for item in values.items() if item[0] <= ended]
        assert sorted(Path("short/checkpoints").iterdir())[-1].name == f"step-{ended:06d}"
        again = load_file("short/policy.safetensors")
        assert all(torch.equal(again[name], value) for name, value in kept.items())
        assert f"ended at step {ended}: 1 rounds without a better validation/held_out/total" in capsys.readouterr().out
        assert cli.main(["train", "hack.yaml", "run=short", *KEEP, "evaluation.patience=1"]) == 0
    # Without it, it goes on to the same end as the run that was never stopped.
    assert cli.main(["train", "hack.yaml", "run=short", *KEEP]) == 0
    assert held_out("short") == values
    again = load_file("short/policy.safetensors")
    assert all(torch.equal(again[name], value) for name, value in kept.items())


@pytest.mark.slow
def test_a_run_that_hacking_ends_keeps_its_best_round(tiny_pipeline_folder, tmp_path, monkeypatch, capsys) -> None:
    """Each time it is started: resumed, it measures its last round again, and is ended by it again."""
    monkeypatch.chdir(tmp_path)
    copies_in_place_of_loading(tiny_pipeline_folder, monkeypatch)
    planted_project(tiny_pipeline_folder)
    monkeypatch.setattr(LatentReward, "logits", size_or_natural)
    own = [*KEEP, "evaluation.stop_on_hacking=true", "training.ema_decay=0.5", "training.keep=9"]
    for _ in range(2):
        assert cli.main(["train", "hack.yaml", *own]) == 2
        values = held_out("run")
        best, ended = max(values, key=lambda step: values[step]), max(values)
        error = " ".join(capsys.readouterr().err.split())
        assert 0 < best < ended and f"reward hacking at step {ended}" in error
        assert (
            f"run/policy.safetensors is the policy of step {best}, the best round by validation/held_out/total" in error
        )
        kept, written = load_file("run/policy.safetensors"), load_file(f"run/best/step-{best:06d}/policy.safetensors")
        assert kept.keys() == written.keys() and all(torch.equal(kept[name], written[name]) for name in kept)
        last = load_file(f"run/checkpoints/step-{ended:06d}/weights.safetensors")
        assert any(not torch.equal(kept[name], value) for name, value in last.items()), "the checkpoint is the last's"
        Path("run/policy.safetensors").unlink()


def test_a_run_killed_after_a_better_round_goes_on_as_if_it_had_not_been(
    tmp_path, tiny_pipeline_folder, monkeypatch
) -> None:
    """The weights of the round that was the best by the last checkpoint are there still."""
    monkeypatch.chdir(tmp_path)
    copies_in_place_of_loading(tiny_pipeline_folder, monkeypatch)
    planted_project(tiny_pipeline_folder)
    config = load_config("hack.yaml", KEEP)
    model, run = build_backbone(config), RunFolder(Path("run"))

    def round_at(step: int, value: float) -> BestPolicy:
        kept = BestPolicy(config, model, run)  # anew each time, as a resumed run has it
        write_results(run.samples / f"step-{step:06d}", [measured(held_out__total=value)], 8.0)
        with torch.no_grad():
            for parameter in model.parameters("policy").values():
                parameter.fill_(float(step))
        kept.after_round(step)
        return kept

    def checkpoint(step: int) -> None:
        for old in run.checkpoints.glob("*"):
            old.rmdir()
        (run.checkpoints / f"step-{step:06d}").mkdir(parents=True)

    def restored(kept: BestPolicy) -> float:
        kept.restore()
        return float(next(iter(model.parameters("policy").values())).flatten()[0])

    noise = {0: 0.1, 10: 0.5, 20: 0.4, 30: 0.7, 40: 0.7, 50: float("nan"), 60: 0.9}
    for step in (0, 10):
        round_at(step, noise[step])
    checkpoint(20)
    assert restored(round_at(20, noise[20])) == 10 and bests("run") == ["step-000010"]
    assert restored(round_at(30, noise[30])) == 30
    assert bests("run") == ["step-000010", "step-000030"], "a run that goes on from 20 may need 10's"
    # Killed; it goes on from 20, and this time 30 is worse (another evaluation seed, say).
    kept = round_at(30, 0.3)
    assert restored(kept) == 10 and kept.rounds_since == 2 and bests("run") == ["step-000010"]
    round_at(30, noise[30])
    checkpoint(40)
    assert restored(round_at(40, noise[40])) == 30, "of equal rounds the earlier"
    assert bests("run") == ["step-000030"]
    assert restored(round_at(50, noise[50])) == 30, "what is not a number is no better"
    assert restored(round_at(60, noise[60])) == 60 and bests("run") == ["step-000030", "step-000060"]


def test_full_fine_tuning_keeps_the_best_transformer(project: Path, capsys) -> None:  # noqa: F811
    save_reward("one", 0)
    keep = ["evaluation.held_out_reward=runs/one/reward", "evaluation.keep_best=held_out/total", "evaluation.every=1"]
    assert cli.main(["train", "full.yaml", *keep, "training.learning_rate=0.3"]) == 0, capsys.readouterr().err
    told = [record for record in metrics("runs/full") if "validation/kept/step" in record]
    values = held_out("runs/full")
    best = max(values, key=lambda step: values[step])
    assert told[-1]["validation/kept/step"] == best and bests("runs/full")[-1] == f"step-{best:06d}"
    config = load_config("full.yaml")
    model, other = build_backbone(config), build_backbone(config)
    load_policy(config, model)
    load_policy(config, other, Path("runs/full/best", f"step-{best:06d}", "transformer"))
    pairs = zip(model.transformer.parameters(), other.transformer.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["evaluation.keep_best=judge/all"], "evaluation.keep_best: no round records it; set evaluation.judge"),
        (["evaluation.keep_best=held_out/total"], "set evaluation.held_out_reward"),
        (["evaluation.keep_best=reward/total"], "no measure that nothing is trained on"),
        (["evaluation.keep_best=judge/all", "evaluation.judge=shapes", "evaluation.every=0"], "there are no rounds"),
        (["evaluation.patience=3"], "a run without evaluation.keep_best does not read it"),
    ],
)
def test_what_nobody_records_cannot_be_kept(project: Path, overrides: list[str], fault: str) -> None:  # noqa: F811
    with pytest.raises(PrflError, match=fault):
        load_config("full.yaml", overrides)


def test_a_measure_that_no_round_has_is_refused_at_the_first(project: Path, capsys) -> None:  # noqa: F811
    save_reward("one", 0)
    keep = ["evaluation.held_out_reward=runs/one/reward", "evaluation.keep_best=held_out/lihgt"]
    assert cli.main(["train", "full.yaml", *keep]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "evaluation.keep_best: no round records validation/held_out/lihgt" in shown
    assert "validation/held_out/light, validation/held_out/calm" in shown
    assert not Path("runs/full/checkpoints").exists(), "before the first step"
