"""One optimizer step of ours as a benchmark's work: what its providers share, what it puts back, what it cost.

A run is one step or, where a rollout serves several, all of its steps; before each run weights and gradients are put
back, so that every round computes the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import worlds
from bench.harness.problem import Outputs, Problem, Work
from bench.harness.report import EVALUATIONS, GRADIENTS
from prfl.backbone import Backbone
from prfl.backbone.network import park_vae
from prfl.config.schema import Config
from prfl.estimate import nfe as forecast
from prfl.estimate.memory import reward_tensors
from prfl.factory.backbone import POLICY
from prfl.factory.objective import build_reward_gradient
from prfl.factory.reward import Reward
from prfl.objective.reused_rollout import ReusedRollout
from prfl.objective.reward_gradient import RewardGradient
from prfl.reward.frames import draw_frames
from prfl.reward.latent import LatentReward
from prfl.rollout.plan import node_number
from prfl.training.optimizer import adamw, apply
from prfl.utils.timing import Clock

PIXEL = "reward={space: pixel, path: new}"
RATE = 1e-5
PRICE = {forecast.GRADIENT: 3.0, forecast.DISTANCE: 0.0}  # a forward is 1; the distance is looked at, not trained on


def middle(chain: int) -> str:
    """Return the steps_range in which only the chain's middle step is drawn: its rollout is as long as the mean."""
    step = chain // 2
    return f"[{(step + 0.25) / chain}, {(step + 0.75) / chain}]"


def problem(
    works: Mapping[str, Callable[[], Work]], reference: str, config: Config, weights: str, **more: Any
) -> Problem:
    """Make the problem of a step: its shapes are the video's and the chain's.  more: other fields of ``Problem``."""
    data = config.data
    shapes = {"video": (config.training.batch, data.frames, data.height, data.width), "chain": (config.rollout.steps,)}
    return Problem(works, reference, getattr(torch, config.backbone.dtype), shapes=shapes, weights=weights, **more)


@dataclass
class Trained:
    """What a run changes, and puts back: parameters and their gradients.  AdamW's averages stay, as in training.

    start: on the host, so that it is in no figure of a GPU's memory.
    """

    parameters: Mapping[str, nn.Parameter]
    start: dict[str, Tensor] = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.start = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        self.optimizer = adamw(list(self.parameters.values()))

    @torch.no_grad()
    def put_back(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.start[name])
            parameter.grad = None

    def forget(self) -> None:
        """Put back, and without AdamW's averages: weights are all that is left."""
        self.put_back()
        self.optimizer.state.clear()

    def wrong(self) -> str:
        """Say what is wrong with the gradients; nothing where they are finite and somewhere not zero."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if not gradients or not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return "its gradient is not there, or not finite"
        return "" if any(bool(gradient.count_nonzero()) for gradient in gradients) else "its gradient is zero"

    def gradients(self) -> Outputs:
        """Return all gradients of a kind in one tensor: the adapter's A and its B."""
        kinds = {"d A": ".lora_A", "d B": ".lora_B"}
        by_name = {name: p.grad for name, p in sorted(self.parameters.items()) if p.grad is not None}
        gradients = {}
        for kind, part in kinds.items():
            gradients[kind] = torch.cat([gradient.flatten() for name, gradient in by_name.items() if part in name])
        return gradients


class Decoder:
    """``model.decode``, and the seconds in it and in its backward pass, from when the pixels' gradient is there to the
    latents'.  plain: without our checkpoints between the latent frames, whatever the blocks have."""

    def __init__(self, model: Backbone) -> None:
        self.seconds, self.plain = 0.0, False
        self._began, self._model = 0.0, model
        self._plain_decode, self._now = model.decode, Clock(model.facts.device).now
        setattr(model, "decode", self.decode)  # noqa: B010  (mypy takes no assignment to a method)

    def decode(self, latents: Tensor, shown: Sequence[int] | None = None) -> Tensor:
        before, mode = self._now(), self._model.running.checkpointing
        self._model.running.checkpointing = "none" if self.plain else mode
        try:
            pixels = self._plain_decode(latents, shown)
        finally:
            self._model.running.checkpointing = mode
        self.seconds += self._now() - before
        if pixels.requires_grad:
            pixels.register_hook(self._begin)
            latents.register_hook(self._end)
        return pixels

    def _begin(self, _: Tensor) -> None:
        self._began = self._now()

    def _end(self, _: Tensor) -> None:
        self.seconds += self._now() - self._began


class Stage:
    """What the providers of a case share: one model and what is trained on it, and a reward of each space.

    It is made when the first of them asks, so that a process which measures one of them has nothing else.
    """

    def __init__(self, world: str) -> None:
        self.world = world
        self._rewards: dict[str, Reward] = {}
        self._built: tuple[Backbone, Trained, Decoder] | None = None

    def model(self, config: Config) -> tuple[Backbone, Trained, Decoder]:
        if self._built is None:
            model = worlds.backbone(config)
            self._built = model, Trained(model.parameters(POLICY)), Decoder(model)
        return self._built

    def objective(self, config: Config) -> RewardGradient:
        model, space = self.model(config)[0], getattr(config.reward, "space", "")
        if space not in self._rewards:
            self._rewards[space] = worlds.reward(self.world, config, model)
        objective = build_reward_gradient(config, model, self._rewards[space], None)
        objective.distance_every = 0
        if space == "latent":
            park_vae(model)  # as a run does; where another provider decodes, it comes back to stay
        return objective


def step_work(
    stage: Stage,
    config: Config,
    frame: int | None = None,
    alike: bool = False,
    agreeing: bool = False,
    plain: bool = False,
) -> Work:
    """Make one optimizer step, or all the steps of a rollout that serves several, a benchmark's work.

    frame: the one latent frame that is decoded, where one is; None is the clip's middle one, whose cost is the mean.
    alike: gives what a step with another reward must have in common with it: the very latents that were scored, and
    which step of the chain was trained; agreeing: its loss and gradients.  plain: the decoder keeps everything.
    """
    (model, trained, decoding), objective = stage.model(config), stage.objective(config)
    clock, steps = Clock(model.facts.device), config.rollout.gradients_per_rollout
    first = first_step(objective, config, objective.latent_shape[1] // 2 if frame is None else frame)
    rounds: list[dict[str, float]] = []
    scored = seen_latents(objective) if alike else {}

    def before() -> None:
        trained.put_back()
        decoding.seconds, decoding.plain = 0.0, plain
        if isinstance(objective.rollouts, ReusedRollout):
            objective.rollouts.rolled_at = None

    def forget() -> None:
        trained.forget()
        scored.clear()
        if isinstance(objective.rollouts, ReusedRollout):
            objective.rollouts.trajectories.clear()

    def run(_: Any) -> Outputs | None:
        spent: dict[str, float] = {}
        outputs: Outputs | None = None
        for step in range(first, first + steps):
            trained.optimizer.zero_grad()
            metrics = objective.accumulate(step, first_indices(config, step))
            if agreeing:
                outputs = {"loss": torch.tensor(metrics["loss"]), **trained.gradients()}
            started = clock.now()
            apply(trained.optimizer, RATE)
            seconds = {part: metrics[f"seconds/{part}"] for part in ("rollout", "reward", "backward")}
            seconds["optimizer"] = clock.now() - started
            spent = {part: spent.get(part, 0.0) + each for part, each in seconds.items()}
            if alike:
                outputs = {"sampled_step": torch.tensor(metrics["sampled_step"]), **scored}
        spent |= {"reward": spent["reward"] - decoding.seconds, "decode": decoding.seconds}
        rounds.append({part: each / steps for part, each in spent.items()})
        return outputs

    reward = objective.scorer.reward  # type: ignore[attr-defined]
    constant = [*(p for network in model.networks.values() for p in network.parameters()), *reward_tensors(reward)]
    facts = evaluations(config, model, objective)
    return Work(run, before, constant, steps, trained.wrong, lambda: rounds, facts, forget)


def seen_latents(objective: RewardGradient) -> dict[str, Tensor]:
    """Record what the objective hands to its reward, by node, whenever it does.

    The tensors themselves, which are there anyway: the dictionary is filled anew with each score.
    """
    plain_score, latents_by_node = objective.score, dict[str, Tensor]()

    def score(latents: Mapping[Any, Tensor], *others: Any) -> Any:
        latents_by_node.clear()
        for node, x in latents.items():
            latents_by_node[f"latents {node_number(node, objective.schedule.steps)}"] = x.detach()
        return plain_score(latents, *others)

    setattr(objective, "score", score)  # noqa: B010  (mypy takes no assignment to a method)
    return latents_by_node


def first_step(objective: RewardGradient, config: Config, frame: int) -> int:
    """Return the first optimizer step in which the one latent frame that is decoded, if one is, is this one."""
    frames = objective.latent_shape[1]
    return next(step for step in count() if draw_frames(frames, "one", config.seed, step) == [frame])


def first_indices(config: Config, step: int) -> list[int]:
    return list(range(step * config.training.batch, (step + 1) * config.training.batch))


def evaluations(config: Config, model: Backbone, objective: RewardGradient) -> dict[str, float]:
    """Count the network evaluations of a sample in one optimizer step, and the solver steps that it differentiates.

    A forward pass is 1, with its backward 3, a reward's by its share of blocks.  Counted as ``prfl train --dry-run``
    does, of the steps that a run has.
    """
    reward = getattr(objective.scorer, "reward", None)
    share = (max(reward.blocks) + 1) / model.facts.num_blocks if isinstance(reward, LatentReward) else 0.0
    steps = config.rollout.gradients_per_rollout
    counted = config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})
    price = {**PRICE, forecast.REWARD: 3 * share}
    of_training = [each for each in forecast.count_nfe(counted, model) if each.name != forecast.SAMPLING]
    total = sum(each.per_step * price.get(each.name, 1.0) for each in of_training)
    gradients = sum(each.per_step for each in of_training if each.name == forecast.GRADIENT)
    return {EVALUATIONS: total / config.training.batch, GRADIENTS: gradients / config.training.batch}
