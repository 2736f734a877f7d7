"""One rollout for several optimizer steps: against plain loops over the states that the old policy made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prfl.backbone import Condition
from prfl.config.sections.training import TrainingConfig
from prfl.objective.methods.dense_process import DenseProcess
from prfl.objective.methods.prfl import Prfl
from prfl.objective.reused_rollout import ReusedRollout
from prfl.objective.reward_gradient import RewardGradient
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.plan import StepPlan, one_step
from prfl.rollout.requirements import coarse, requirements
from prfl.rollout.solvers import euler, flow_sde
from prfl.training.distributed import make_accelerator
from prfl.training.loop import fit
from prfl.training.run_folder import RunFolder
from prfl.utils import rng
from prfl.utils.errors import PrflError
from prfl.utils.order import shuffled
from tests.objective.parts import PROMPTS, take_gradients
from tests.objective.toy import LOSS, ToyScorer, toy_objective

STEPS, BATCH, SPAN = 7, 2, 3
CHAIN = euler(chain_sigmas(STEPS, 3.0))
NOISY = flow_sde(chain_sigmas(STEPS, 3.0), 0.7)
METHODS = {
    "prfl": Prfl(CHAIN, 0),
    "prfl, clean": Prfl(CHAIN, 1, handoff="clean"),
    "prfl, stochastic": Prfl(NOISY, 2),
    "dense_process": DenseProcess(CHAIN, 3, rewards=3),
    "dense_process, all": DenseProcess(CHAIN, 3, rewards=STEPS),
    "dense_process, each its step": DenseProcess(CHAIN, 4, rewards=2, credit="step"),
    "dense_process, clean": DenseProcess(CHAIN, 5, rewards=2, handoff="clean"),
}


def reusing(method, drift_limit: float | None = None, **more) -> RewardGradient:
    return toy_objective(method, rollouts=ReusedRollout(SPAN, BATCH, drift_limit), **more)


def indices_of(step: int) -> list[int]:
    return [step * BATCH, step * BATCH + 1]


def learn(objective: RewardGradient, size: float = 0.05) -> None:
    """What stands for an optimizer's step."""
    with torch.no_grad():
        for name, parameter in objective.parameters().items():
            parameter += (
                size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))).double()
            )


@dataclass
class Old:
    """What the policy of an earlier step made: its states, and what follows in the same way now."""

    objective: RewardGradient
    step: int

    def __post_init__(self) -> None:
        indices, method = indices_of(self.step), self.objective.method
        prompts = [PROMPTS[i] for i in shuffled(indices, len(PROMPTS), method.seed, "prompts")]
        self.condition = self.objective.backbone.condition(prompts)
        self.chain, self.noises = method.schedule, rng.ChainNoises((3, 1, 1, 1), method.seed, self.step, indices)
        self.states = [rng.normal((3, 1, 1, 1), method.seed, "start", self.step, indices).double()]
        with torch.no_grad():
            for m in range(STEPS):
                self.states.append(self.after(m, self.velocity(m)))

    def velocity(self, m: int) -> Tensor:
        return self.objective.backbone.velocity(self.states[m], self.chain.sigmas[m], self.condition)

    def after(self, m: int, velocity: Tensor) -> Tensor:
        x = self.chain.a[m] * self.states[m] + self.chain.b[m][m] * velocity
        return x + self.chain.c[m] * self.noises[m].double() if self.chain.c[m] else x

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        return LOSS(self.objective.scorer(x, sigma.expand(len(x)), self.condition, 0))[0].mean()

    def loss(self, trained: list[int]) -> tuple[Tensor, float]:
        """Of the present policy, and the drift."""
        method, losses, drifts = self.objective.method, [], []
        passed = torch.zeros(())
        clean = method.handoff == "clean"
        for m in trained:
            v = self.velocity(m)
            then, now = self.states[m + 1], self.after(m, v)
            far = (now - then).flatten(1).norm(dim=1) / (then - self.states[m]).flatten(1).norm(dim=1)
            drifts.append(float(far.detach().mean()))
            sigma = torch.zeros(()) if clean else self.chain.sigmas[m + 1]
            end = self.states[m] - self.chain.sigmas[m] * v if clean else now
            losses.append(self.score(end + passed, sigma))
            if getattr(method, "credit", "step") == "chain":
                passed = passed + self.chain.b[m][m] * (v - v.detach())
        return torch.stack(losses).mean(), sum(drifts) / len(drifts)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", METHODS)
def test_equals_the_plain_loop_over_the_old_states(name: str, checkpointing: str) -> None:
    method = METHODS[name]
    objective = reusing(method)
    objective.backbone.running.checkpointing = checkpointing
    for step in range(2 * SPAN + 1):
        if step % SPAN == 0:
            old = Old(objective, step)
        loss, drift = old.loss(sorted(method.plan(step).plan.trains))
        loss.backward()
        expected = take_gradients(objective)
        metrics = objective.accumulate(step, indices_of(step))
        for key, gradient in take_gradients(objective).items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-11)
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9), "the reward at the present end"
        assert metrics["rollout_age"] == step % SPAN
        assert metrics.get("drift", 0.0) == pytest.approx(drift, rel=1e-9)
        assert ("drift" in metrics) == (step % SPAN > 0) == (drift > 0)
        learn(objective)


def stored_ends(self, network, trajectory, step_plan):
    return {node: trajectory.at(node) for node in step_plan.seeds}


SPOILT = {
    "the reward at the stored latents": (ReusedRollout, "scored", stored_ends),
    "its own prompts and noise": (ReusedRollout, "origin", lambda self, step, indices: (self.rolled_at, list(indices))),
    "a rollout in every step": (
        ReusedRollout,
        "begin",
        lambda self, step, parameters: setattr(self, "rolled_at", step),
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_the_comparison_catches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*SPOILT[name])
    with pytest.raises(AssertionError, match="not close"):
        test_equals_the_plain_loop_over_the_old_states("dense_process, all", "none")


@pytest.mark.parametrize(
    "method",
    [METHODS["prfl"], METHODS["prfl, clean"], DenseProcess(CHAIN, 3, rewards=2, steps_range=(0.6, 1.0))],
    ids=["prfl", "prfl, clean", "dense_process"],
)
def test_a_coarse_rollout_for_several_steps(method) -> None:
    """The old states are those of the chain of visited nodes."""
    objective = reusing(method, stride=2)
    for step in range(SPAN):
        if step == 0:
            plans = [method.plan(s) for s in range(SPAN)]
            path = requirements(plans, CHAIN, 2, reused=True).path
            assert path != list(range(path[-1] + 1)), "it leaps"
            old = Old(objective, 0)
            with torch.no_grad():
                for i, j in zip(path[:-1], path[1:], strict=True):
                    old.states[j] = old.states[i] + (CHAIN.sigmas[j] - CHAIN.sigmas[i]) * old.velocity(i)
            before = {m: old.after(m, old.velocity(m)).detach() for c in plans for m in c.plan.trains}
            old.states = [before.get(m - 1, x) if m not in path else x for m, x in enumerate(old.states)]
        loss, _ = old.loss(sorted(method.plan(step).plan.trains))
        loss.backward()
        expected = take_gradients(objective)
        objective.accumulate(step, indices_of(step))
        for key, gradient in take_gradients(objective).items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-11)
        learn(objective)


def test_the_nodes_that_a_rollout_visits_and_keeps() -> None:
    plans = [StepPlan(one_step(CHAIN, m), {m + 1: 1.0}) for m in (3, 1, 5)]
    needs = requirements(plans, CHAIN, reused=True)
    assert (needs.path, needs.latents, needs.outputs) == (list(range(7)), {1, 3, 5}, {1, 3, 5})
    last_held = requirements([plans[2], *plans[:2]], CHAIN, retain_graph=True, reused=True)
    assert (last_held.path, last_held.outputs) == (list(range(6)), {1, 3}), "the held edge runs step 5"
    assert requirements(plans[:2], CHAIN, 2, reused=True).path == coarse({0, 1, 3, 4}, 2)


def test_a_batch_in_parts_is_the_batch() -> None:
    whole, parts = reusing(METHODS["prfl"]), reusing(METHODS["prfl"])
    for step in range(SPAN + 1):
        of_whole = whole.accumulate(step, indices_of(step))
        of_parts = [parts.accumulate(step, [index]) for index in indices_of(step)]
        expected = take_gradients(whole)
        for key, gradient in take_gradients(parts).items():
            torch.testing.assert_close(gradient / 2, expected[key], rtol=1e-9, atol=1e-11)
        if step % SPAN:
            assert sum(part["drift"] for part in of_parts) / 2 == pytest.approx(of_whole["drift"])
        learn(whole)
        learn(parts)
    assert len(parts.rollouts.trajectories) == 2 and len(whole.rollouts.trajectories) == 1


def test_drift_above_the_limit_ends_the_use_of_a_rollout() -> None:
    objective = reusing(METHODS["prfl"], drift_limit=0.04)
    ages, drifts = [], []
    for step, size in enumerate([0.0, 1e-3, 0.3, 0.0, 0.0, 0.0, 0.3]):
        metrics = objective.accumulate(step, indices_of(step))
        objective.after_step(metrics)
        ages.append(int(metrics["rollout_age"]))
        drifts.append(metrics.get("drift"))
        learn(objective, size)
    assert ages == [0, 1, 2, 0, 1, 2, 0] and drifts[1] == 0 < drifts[2] < 0.04
    learn(objective, 0.3)
    for step in (7, 8, 9, 10):
        metrics = objective.accumulate(step, indices_of(step))
        objective.after_step(metrics)
        ages.append(int(metrics["rollout_age"]))
    assert ages[7:] == [1, 0, 1, 2], "far away in step 7, so step 8 makes its own, which serves three steps again"


@pytest.mark.parametrize("name", ["prfl", "dense_process, clean"])
def test_a_new_process_makes_the_same_rollout_again(name: str) -> None:
    """Other parts of the batch, too: as on another number of processes."""
    straight, before, after = (reusing(METHODS[name]) for _ in range(3))
    for objective in (straight, before):
        for step in range(2):
            objective.accumulate(step, indices_of(step))
            take_gradients(objective)
            learn(objective)
    with torch.no_grad():
        for key, parameter in after.parameters().items():
            parameter.copy_(before.parameters()[key])
    after.load_state_dict(before.state_dict())
    expected = straight.accumulate(2, indices_of(2))
    gradients = take_gradients(straight)
    found = after.accumulate(2, indices_of(2))
    assert {k: v for k, v in found.items() if "seconds" not in k} == {
        k: v for k, v in expected.items() if "seconds" not in k
    }
    assert all(torch.equal(g, gradients[key]) for key, g in take_gradients(after).items())
    for index in indices_of(2):
        after.accumulate(2, [index])
    for key, gradient in take_gradients(after).items():
        torch.testing.assert_close(gradient / 2, gradients[key], rtol=1e-9, atol=1e-11)
    for key, parameter in after.parameters().items():
        assert torch.equal(parameter, before.parameters()[key]), "its own weights are back"


def test_weights_that_do_not_fit_are_refused() -> None:
    objective = reusing(METHODS["prfl"])
    assert objective.state_dict() == {}
    objective.accumulate(0, indices_of(0))
    tensors = objective.state_dict()
    with pytest.raises(PrflError, match="do not fit the policy"):
        objective.load_state_dict({k: v for k, v in tensors.items() if k != "weights/w1"})
    assert not toy_objective(METHODS["prfl"]).state_dict()


@pytest.mark.parametrize("drift_limit", [None, 1e-9])
def test_what_a_failed_step_leaves_is_what_it_scored(
    drift_limit: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where drift was above its limit in that very step: only the next one makes a new rollout."""
    objective = reusing(METHODS["prfl"], drift_limit)
    seen: list[Tensor] = []
    score = ToyScorer.__call__

    def failing(self: ToyScorer, x: Tensor, sigma: Tensor, condition: Condition, step: int) -> dict[str, Tensor]:
        seen.append(x.detach())
        scores = score(self, x, sigma, condition, step)
        return {name: values / (step != 1) for name, values in scores.items()}

    monkeypatch.setattr(ToyScorer, "__call__", failing)
    own = TrainingConfig(steps=3, batch=BATCH, learning_rate=0.05, trackers=[])
    with pytest.raises(PrflError, match="in step 1"):
        run = RunFolder(tmp_path)
        fit(objective, own, run, accelerator=make_accelerator(run, "cpu", trackers=[]))
    left = load_file(tmp_path / "failed" / "step-000001" / "batch.safetensors")
    (node,) = (name for name in left if name.startswith("batch/scored/"))
    assert len(seen) == 2 and torch.equal(left[node], seen[1])
    assert torch.equal(left["batch/start"], rng.normal((3, 1, 1, 1), 0, "start", 0, indices_of(0)).double())
