"""Every method on UniPC and on the stochastic step, with native and unit step weights: one joint graph in float64.

The loops know neither schedules nor plans: UniPC is diffusers' scheduler, which keeps its own history, and the
stochastic step is written out.  Methods that start inside the chain are not here: the rules refuse them for UniPC, and
test_methods.py has them on Euler's steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from prfl.objective.methods.alignprop import AlignProp
from prfl.objective.methods.base import Method
from prfl.objective.methods.dense_process import DenseProcess
from prfl.objective.methods.draft_lv import DraftLv
from prfl.objective.methods.drtune import DrTune
from prfl.objective.methods.leapalign import LeapAlign
from prfl.objective.methods.prfl import Prfl
from prfl.objective.methods.vader import Vader
from prfl.objective.reward_gradient import RewardGradient
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.solvers import SolverSchedule, flow_sde, unipc
from prfl.utils import rng
from tests.objective.parts import take_gradients
from tests.objective.toy import LOSS, toy_objective
from tests.rollout.test_unipc import scheduler_of

STEPS, ETA = 6, 0.7
SIGMAS = chain_sigmas(STEPS, 3.0)
INDICES = [3, 4]


class UniPc:
    """To be called for every step, in order."""

    def __init__(self, shape: tuple[int, ...], step: int, seed: int) -> None:
        self.scheduler = scheduler_of(SIGMAS, 2)

    def advance(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        return self.scheduler.step(v, self.scheduler.timesteps[i], x).prev_sample

    def alone(self, i: int, x: Tensor, v: Tensor, after: Tensor) -> Tensor:
        """The step's end with the gradient of what it adds to x[i]: earlier outputs too."""
        return x.detach() + (after - x)


class FlowSde:
    def __init__(self, shape: tuple[int, ...], step: int, seed: int) -> None:
        self.shape, self.step, self.seed = shape, step, seed

    def advance(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        t, after = SIGMAS[i], SIGMAS[i + 1]
        if after == 0:
            return x - t * v
        std = ETA * torch.sqrt(t / (1 - (after if i == 0 else t)))
        noise = rng.normal(self.shape, self.seed, f"noise/{i}", self.step, INDICES).double()
        return x + (v + std**2 / (2 * t) * (x + (1 - t) * v)) * (after - t) + std * torch.sqrt(t - after) * noise

    def alone(self, i: int, x: Tensor, v: Tensor, after: Tensor) -> Tensor:
        return self.advance(i, x.detach(), v)


SOLVERS: dict[str, tuple[SolverSchedule, Callable]] = {
    "unipc": (unipc(SIGMAS), UniPc),
    "flow_sde": (flow_sde(SIGMAS, ETA), FlowSde),
}


@dataclass
class Joint:
    """The chain of one step in one graph.  unit: step weights; ``sizes`` is then what each trained call enters by."""

    objective: RewardGradient
    step: int
    make: Callable
    unit: bool
    own: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        _, self.condition, self.start = self.objective.draw(self.step, INDICES)
        self.solver = self.make(self.objective.latent_shape, self.step, self.objective.seed)
        solver, x = self.make(self.objective.latent_shape, self.step, self.objective.seed), torch.zeros_like(self.start)
        for i in range(STEPS):  # how much of its output a step adds: the solver is linear
            v = torch.zeros_like(x, requires_grad=True)
            x = solver.advance(i, x, v)
            self.own.append(float(torch.autograd.grad(x.sum(), v, retain_graph=True)[0].abs().mean()))

    def velocity(self, x: Tensor, sigma: Tensor, size: float) -> Tensor:
        """With unit weights the parameters' gradient, and theirs alone, is brought to the chain's mean step."""
        backbone = self.objective.backbone
        weights, share = backbone.weights, sum(self.own) / STEPS / size if self.unit else 1.0
        backbone.weights = {name: share * p + (1 - share) * p.detach() for name, p in weights.items()}
        try:
            return backbone.velocity(x, sigma, self.condition)
        finally:
            backbone.weights = weights

    def chain(
        self, trained: Collection[int], beta: float, last: int = STEPS, sizes: Mapping[int, float] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """x[0] .. x[last], v[0] .. v[last - 1]; gradient in the trained steps, a share beta of it to their inputs."""
        x, v = [self.start], []
        for i in range(last):
            with torch.set_grad_enabled(i in trained):
                seen = beta * x[i] + (1 - beta) * x[i].detach()
                v.append(self.velocity(seen, SIGMAS[i], (sizes or {}).get(i, self.own[i])))
            x.append(self.solver.advance(i, x[i], v[i]))
        return x, v

    def score(self, x: Tensor, sigma: Tensor = SIGMAS[-1]) -> Tensor:
        return LOSS(self.objective.scorer(x, sigma.expand(len(x)), self.condition, self.step))[0]


def clean(joint: Joint, x: Tensor, k: int) -> Tensor:
    return x - SIGMAS[k] * joint.velocity(x.detach(), SIGMAS[k], float(SIGMAS[k]))


def prfl(joint: Joint, own: Prfl, trained: list[int]) -> Tensor:
    (m,) = trained
    if own.handoff == "clean":
        return joint.score(clean(joint, joint.chain([], 0, m)[0][m], m)).mean()
    return joint.score(joint.chain([m], 0, m + 1)[0][-1], SIGMAS[m + 1]).mean()


def truncated(joint: Joint, own: Vader | AlignProp, trained: list[int]) -> Tensor:
    return joint.score(joint.chain(trained, 1)[0][-1]).mean()


def draft_lv(joint: Joint, own: DraftLv, trained: list[int]) -> Tensor:
    last, end = SIGMAS[-2], joint.chain([STEPS - 1], 0)[0][-1]
    losses = [joint.score(end).mean()]
    for copy in range(own.copies):
        name = f"noised/{2 * STEPS + 1 + 2 * copy}"
        noise = rng.normal(joint.objective.latent_shape, 0, name, joint.step, INDICES).double()
        noisy = (1 - last) * end.detach() + last * noise
        losses.append(joint.score(clean(joint, noisy, STEPS - 1)).mean())
    return torch.stack(losses).mean()


def drtune(joint: Joint, own: DrTune, trained: list[int]) -> Tensor:
    end = own.end(joint.step)
    if not own.early_stop:
        return joint.score(joint.chain(trained, 0)[0][-1]).mean()
    x = joint.chain(trained, 0, end)[0][-1]
    with torch.set_grad_enabled(end in trained):
        v = joint.velocity(x.detach(), SIGMAS[end], float(SIGMAS[end]))
    return joint.score(x - SIGMAS[end] * v).mean()


def leapalign(joint: Joint, own: LeapAlign, trained: list[int]) -> Tensor:
    (k, j), states = trained, joint.chain([], 0)[0]
    far, x = float(SIGMAS[k] - SIGMAS[j]), states[k]
    leapt = x - far * joint.velocity(x, SIGMAS[k], far)
    x = leapt + (states[j] - leapt).detach()
    nested = own.alpha * x + (1 - own.alpha) * x.detach()
    landed = x - SIGMAS[j] * joint.velocity(nested, SIGMAS[j], float(SIGMAS[j]))
    weight = torch.ones(len(x), dtype=x.dtype)
    if own.similarity_floor is not None:
        pairs = (leapt, states[j]), (landed, states[-1])
        missed = [(a - b).detach().abs().flatten(1).mean(1).clamp(min=own.similarity_floor) for a, b in pairs]
        weight = 1 / (missed[0] + missed[1])
    return (weight * joint.score(landed + (states[-1] - landed).detach())).mean()


def dense(joint: Joint, own: DenseProcess, trained: list[int]) -> Tensor:
    drawn, jumps, each = own.drawn(joint.step), own.handoff == "clean", own.credit == "step"
    sizes = {}
    for m in drawn if jumps else []:  # of a step and a jump from one node, the larger
        stepped = 0.0 if each or m == drawn[-1] else joint.own[m]
        sizes[m] = max(float(SIGMAS[m]), stepped)
    x, v = joint.chain(trained, 0 if each else own.beta, drawn[-1] + 1, sizes)
    losses = []
    for m in drawn:
        if jumps:
            losses.append(joint.score((x[m].detach() if each else x[m]) - SIGMAS[m] * v[m]))
        else:
            end = joint.solver.alone(m, x[m], v[m], x[m + 1]) if each else x[m + 1]
            losses.append(joint.score(end, SIGMAS[m + 1]))
    return torch.stack(losses).mean()


METHODS: dict[str, tuple[Callable[[SolverSchedule], Method], Callable]] = {
    "prfl": (lambda c: Prfl(c, 0), prfl),
    "refl": (lambda c: Prfl(c, 0, handoff="clean", steps_range=(0.4, 1.0)), prfl),
    "draft_k": (lambda c: Vader(c, 0, 3), truncated),
    "full_chain": (lambda c: Vader(c, 0, STEPS), truncated),
    "alignprop": (lambda c: AlignProp(c, 0), truncated),
    "draft_lv": (lambda c: DraftLv(c, 0, 2), draft_lv),
    "drtune": (lambda c: DrTune(c, 0, 2), drtune),
    "drtune, random, early stop": (lambda c: DrTune(c, 0, 2, spacing="random", early_stop=0.6), drtune),
    "leapalign": (lambda c: LeapAlign(c, 0), leapalign),
    "leapalign, no weights": (lambda c: LeapAlign(c, 2, alpha=0.6, similarity_floor=None), leapalign),
    "dense_process": (lambda c: DenseProcess(c, 0, rewards=3), dense),
    "dense_process, exact": (lambda c: DenseProcess(c, 1, rewards=2, beta=1.0), dense),
    "dense_process, damped": (lambda c: DenseProcess(c, 2, rewards=2, beta=0.3), dense),
    "dense_process, each its step": (lambda c: DenseProcess(c, 3, rewards=4, credit="step"), dense),
    "dense_process, clean": (lambda c: DenseProcess(c, 4, rewards=3, handoff="clean"), dense),
    "dense_process, clean, exact": (lambda c: DenseProcess(c, 5, rewards=2, handoff="clean", beta=1.0), dense),
    "dense_process, clean, each its step": (
        lambda c: DenseProcess(c, 6, rewards=4, handoff="clean", credit="step"), dense,
    ),
}  # fmt: skip


@pytest.mark.parametrize("weight", ["native", "unit"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", METHODS)
def test_equals_the_joint_graph(name: str, solver: str, weight: str) -> None:
    schedule, make = SOLVERS[solver]
    method, loop = METHODS[name][0](schedule), METHODS[name][1]
    objective = toy_objective(method, step_weight=weight)
    for step in range(4):
        joint = Joint(objective, step, make, weight == "unit")
        loop(joint, method, sorted(k for k in method.plan(step).plan.trains if isinstance(k, int))).backward()
        expected = take_gradients(objective)
        for checkpointing in ("none", "full"):  # whose edge is kept, where there is one alone
            objective.backbone.running.checkpointing = checkpointing
            objective.accumulate(step, INDICES)
            for key, found in take_gradients(objective).items():
                assert float(expected[key].abs().max()) > 1e-3
                torch.testing.assert_close(found, expected[key], rtol=1e-8, atol=1e-9)


def without_earlier(schedule: SolverSchedule) -> SolverSchedule:
    return replace(schedule, b=tuple({i: factors[i]} for i, factors in enumerate(schedule.b)))


def stretched(schedule: SolverSchedule) -> SolverSchedule:
    return replace(schedule, b=tuple({k: 1.01 * factor for k, factor in b.items()} for b in schedule.b))


PLANTED = {
    "one output a step": ("drtune", "unipc", without_earlier),
    "no pull to the mean": ("draft_k", "flow_sde", lambda c: replace(c, a=(1.0,) * STEPS)),
    "another step": ("alignprop", "flow_sde", stretched),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_the_comparison_catches(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, solver, spoil = PLANTED[plant]
    monkeypatch.setitem(SOLVERS, solver, (spoil(SOLVERS[solver][0]), SOLVERS[solver][1]))
    with pytest.raises(AssertionError, match="not close"):
        test_equals_the_joint_graph(name, solver, "native")


@pytest.mark.parametrize("name", ["prfl", "leapalign", "dense_process, clean"])
def test_the_comparison_catches_native_step_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prfl.objective.reward_gradient.unit_steps", lambda schedule, plan: plan)
    with pytest.raises(AssertionError, match="not close"):
        test_equals_the_joint_graph(name, "unipc", "unit")
