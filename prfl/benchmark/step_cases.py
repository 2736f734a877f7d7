"""Training steps: a latent against a pixel reward in the same step, the methods as they are, and the plain rival.

A run is one optimizer step or, where a rollout serves several, all of its steps; before each run weights and gradients
are put back, so that every round computes the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from prfl import build
from prfl.backbone import Condition, WanBackbone
from prfl.backbone.condition import pad_to
from prfl.backbone.wan import TEXT_TOKENS
from prfl.benchmark import worlds
from prfl.benchmark.measure import release
from prfl.benchmark.problem import Case, Outputs, Problem, Work
from prfl.benchmark.report import EVALUATIONS
from prfl.config.schema import Config
from prfl.flow import chain_sigmas
from prfl.forecast import work as forecast
from prfl.forecast.memory import reward_tensors
from prfl.objective.clock import Clock
from prfl.objective.pathwise import Pathwise
from prfl.objective.scorer import RewardLoss, draw_frames
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelReward
from prfl.training.optimizer import adamw, apply

OURS, RIVAL = "ours", "rival"
LATENT, PRFL = "latent", "prfl"
PIXEL = "reward={space: pixel, path: new}"
RATE = 1e-5
REUSED = 4

PRICE = {forecast.GRADIENT: 3.0, forecast.DISTANCE: 0.0}  # a forward is 1; the distance is looked at, not trained on
SIZES = {  # frames and steps of the chain: of the same step and the rival, and of the methods
    "tiny": ((17, 6), (17, 6)),
    "small": ((17, 6), (17, 6)),
    "wan-1.3b": ((81, 20), (81, 12)),
    "wan-14b": ((81, 4), (33, 8)),  # a full chain of 81 frames takes minutes a step
}
SAME = {LATENT: "", "pixel_1": "one", "pixel_4": "4", "pixel_all": "all"}
METHODS = {
    PRFL: (),
    "dense": ("objective={name: dense_process}",),
    "reuse": ("objective={name: prfl}", f"rollout.gradients_per_rollout={REUSED}", "rollout.drift_limit=null"),
    "full_chain": ("objective={name: full_chain}",),
    "vader_1": (PIXEL, "objective={name: vader, last_steps: 1, frames: one}"),
    "vader_5": (PIXEL, "objective={name: vader, last_steps: 5, frames: one}"),
}
NAMES = {
    "pixel_1": "pixel, one latent frame", "pixel_4": "pixel, 4 latent frames", "pixel_all": "pixel, all frames",
    "reuse": f"prfl, {REUSED} gradients a rollout", "full_chain": "full chain", "vader_1": "vader, K=1",
    "vader_5": "vader, K=5",
}  # fmt: skip


def cases(world: str) -> list[Case]:
    needs = worlds.WORLDS[world].needs
    (frames, chain), (fewer, shorter) = SIZES[world]
    own = {"world": world, "frames": frames, "chain": chain}
    methods_own = {"world": world, "frames": fewer, "chain": shorter}
    return [
        Case("same_step", same_step, own, tuple(SAME), needs),
        Case("methods", methods, methods_own, tuple(METHODS), needs),
        Case("rival_prfl", rival_prfl, own, (RIVAL, OURS), needs),
        Case("rival_vader", rival_vader, own, (RIVAL, OURS), needs),
    ]


def middle(chain: int) -> str:
    """Only the chain's middle step is drawn: its rollout is as long as the mean one."""
    step = chain // 2
    return f"[{(step + 0.25) / chain}, {(step + 0.75) / chain}]"


def same_step(world: str, frames: int, chain: int) -> Problem:
    """One step of PRFL that hands its clean prediction over: the same rollout, step, prompts and noise; only the reward
    differs.  The pixel reward, too, is differentiated by itself, through a decoder that is chunked and checkpointed."""
    size = f"data.frames={frames}", f"rollout.steps={chain}"

    def own(seen: str) -> Config:
        objective = f"name: prfl, handoff: clean, steps_range: {middle(chain)}"
        if not seen:
            return worlds.config(world, (*size, f"objective={{{objective}}}"))
        return worlds.config(world, (*size, PIXEL, f"objective={{{objective}, frames: {seen}}}"))

    stage = Stage(world)
    works = {name: lambda seen=seen: step_work(stage, own(seen), alike=True) for name, seen in SAME.items()}
    return _problem(works, LATENT, own(""), f"{worlds.weights(own(''))}, pixel reward random")


def methods(world: str, frames: int, chain: int) -> Problem:
    """Each as it is.  They compute different things: their gradients are checked, not compared."""
    size = f"data.frames={frames}", f"rollout.steps={chain}", f"objective={{name: prfl, steps_range: {middle(chain)}}}"
    configs = {name: worlds.config(world, (*size, *overrides)) for name, overrides in METHODS.items()}
    stage = Stage(world)
    works = {name: lambda own=own: step_work(stage, own) for name, own in configs.items()}
    return _problem(works, PRFL, configs[PRFL], f"{worlds.weights(configs[PRFL])}, pixel reward random")


def _problem(
    works: Mapping[str, Callable[[], Work]], reference: str, own: Config, weights: str, **more: Any
) -> Problem:
    data = own.data
    shapes = {"video": (own.training.batch, data.frames, data.height, data.width), "chain": (own.rollout.steps,)}
    return Problem(
        works, reference, getattr(torch, own.backbone.dtype), shapes=shapes, names=NAMES, weights=weights, **more
    )


# ----------------------------------------------------------------------------------------------------------- our steps


@dataclass
class Trained:
    """What a run changes, and puts back: parameters, their gradients and AdamW's averages."""

    parameters: Mapping[str, nn.Parameter]
    start: dict[str, Tensor] = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = adamw(list(self.parameters.values()))

    @torch.no_grad()
    def put_back(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.start[name])
            parameter.grad = None

    def wrong(self) -> str:
        """What is wrong with the gradients; nothing where they are finite and somewhere not zero."""
        found = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if not found or not all(bool(gradient.isfinite().all()) for gradient in found):
            return "its gradient is not there, or not finite"
        return "" if any(bool(gradient.count_nonzero()) for gradient in found) else "its gradient is zero"

    def gradients(self) -> Outputs:
        """All of a kind in one tensor: the adapter's A and its B."""
        kinds = {"d A": ".lora_A", "d B": ".lora_B"}
        own = {name: p.grad for name, p in sorted(self.parameters.items()) if p.grad is not None}
        return {
            kind: torch.cat([g.flatten() for name, g in own.items() if part in name]) for kind, part in kinds.items()
        }


class DecodeClock:
    """Seconds in ``model.decode`` and in its backward pass, from when the pixels' gradient is there to the latents'."""

    def __init__(self, model: WanBackbone) -> None:
        self.seconds, self._began = 0.0, 0.0
        self._own, self._now = model.decode, Clock(model.device).now
        setattr(model, "decode", self.decode)  # noqa: B010  (mypy takes no assignment to a method)

    def decode(self, latents: Tensor, gradient_from: int = 0) -> Tensor:
        before = self._now()
        pixels = self._own(latents, gradient_from)
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
        self._rewards: dict[str, build.Reward] = {}
        self._made: tuple[WanBackbone, Trained, DecodeClock] | None = None

    def model(self, own: Config) -> tuple[WanBackbone, Trained, DecodeClock]:
        if self._made is None:
            model = worlds.backbone(own)
            self._made = model, Trained(model.adapter_parameters(build.POLICY)), DecodeClock(model)
        return self._made

    def objective(self, own: Config) -> Pathwise:
        model, space = self.model(own)[0], getattr(own.reward, "space", "")
        if space not in self._rewards:
            self._rewards[space] = worlds.reward(self.world, own, model)
        objective = build.steering(own, model, self._rewards[space], None)
        objective.distance_every = 0
        if space == "latent":
            model.park_vae()  # as a run does; where another provider decodes, it comes back to stay
        return objective


def step_work(stage: Stage, own: Config, frame: int | None = None, alike: bool = False, agreeing: bool = False) -> Work:
    """frame: the one latent frame that is decoded, where one is; None is the clip's middle one, whose cost is the mean.

    alike: gives what a step with another reward must have in common with it; agreeing: its loss and gradients."""
    (model, trained, decoding), objective = stage.model(own), stage.objective(own)
    clock, steps = Clock(model.device), own.rollout.gradients_per_rollout
    first = first_step(objective, own, objective.latent_shape[1] // 2 if frame is None else frame)
    rounds: list[dict[str, float]] = []

    def before() -> None:
        trained.put_back()
        decoding.seconds = 0.0
        if objective.reuse:
            objective.reuse.rolled_at = None

    def run(_: Any) -> Outputs | None:
        spent: dict[str, float] = {}
        outputs: Outputs | None = None
        for step in range(first, first + steps):
            trained.optimizer.zero_grad()
            metrics = objective.accumulate(step, first_indices(own, step))
            if agreeing:
                outputs = {"loss": torch.tensor(metrics["loss"]), **trained.gradients()}
            started = clock.now()
            apply(trained.optimizer, RATE)
            seconds = {part: metrics[f"seconds/{part}"] for part in ("rollout", "reward", "backward")}
            seconds["optimizer"] = clock.now() - started
            spent = {part: spent.get(part, 0.0) + each for part, each in seconds.items()}
            if alike:
                outputs = {name: torch.tensor(metrics[name]) for name in ("latents/max", "sampled_step", "node")}
        spent |= {"reward": spent["reward"] - decoding.seconds, "decode": decoding.seconds}
        rounds.append({part: each / steps for part, each in spent.items()})
        return outputs

    reward = objective.scorer.reward  # type: ignore[attr-defined]
    constant = [*model.transformer.parameters(), *model.vae.parameters(), *reward_tensors(reward)]
    facts = {EVALUATIONS: evaluations(own, model, objective)}
    return Work(run, before, constant, steps, trained.wrong, lambda: rounds, facts)


def first_step(objective: Pathwise, own: Config, frame: int) -> int:
    """The first optimizer step in which the one latent frame that is decoded, if one is, is this one."""
    frames = objective.latent_shape[1]
    return next(step for step in count() if draw_frames(frames, "one", own.seed, step) == [frame])


def first_indices(own: Config, step: int) -> list[int]:
    return list(range(step * own.training.batch, (step + 1) * own.training.batch))


def evaluations(own: Config, model: WanBackbone, objective: Pathwise) -> float:
    """Of a sample, for one optimizer step: a forward pass is 1, with its backward 3, a reward's by its share of blocks.

    Counted as ``prfl train --dry-run`` does, of the steps that a run has.
    """
    reward = getattr(objective.scorer, "reward", None)
    share = (max(reward.blocks) + 1) / model.num_blocks if isinstance(reward, LatentReward) else 0.0
    steps = own.rollout.gradients_per_rollout
    counted = own.model_copy(update={"training": own.training.model_copy(update={"steps": steps})})
    price = {**PRICE, forecast.REWARD: 3 * share}
    of_training = [each for each in forecast.count_work(counted, model) if each.name != forecast.SAMPLING]
    return sum(each.per_step * price.get(each.name, 1.0) for each in of_training) / own.training.batch


# ----------------------------------------------------------------------------------------------------------- the rival


@dataclass(frozen=True)
class Given:
    """What both sides start from.  text: padded as WanPipeline pads it.  adapter: the policy's weights."""

    noise: Tensor
    text: Tensor
    condition: Condition
    sigmas: Tensor
    adapter: dict[str, Tensor]
    loss: RewardLoss


def given(own: Config, model: WanBackbone, objective: Pathwise) -> Given:
    step = first_step(objective, own, 0)
    _, condition, noise = objective.draw(step, first_indices(own, step))
    sigmas = chain_sigmas(own.rollout.steps, build.shift(own, model)).to(noise)
    text = pad_to(condition.prompt_embeds, TEXT_TOKENS)
    return Given(noise, text, condition, sigmas, model.adapter_state(build.POLICY), objective.loss)


def rival_prfl(world: str, frames: int, chain: int) -> Problem:
    """PRFL's own step beside the joint graph's."""
    own = _rival_config(world, frames, chain, f"{{name: prfl, steps_range: {middle(chain)}}}")

    def rival() -> Work:
        stage = Stage(world)
        (model, *_), objective = stage.model(own), stage.objective(own)
        start, reward = given(own, model, objective), objective.scorer.reward  # type: ignore[attr-defined]
        assert isinstance(reward, LatentReward) and len(reward.blocks) == 1
        head, dimensions = reward.head, reward.dimensions
        shown = dict if _logits(own) else reward.normalisation.apply
        script, lora = _script(), reward.adapter
        seen = worlds.transformer(own)
        seen.blocks = seen.blocks[: reward.blocks[0] + 1]  # a second model, as public code has it
        if lora:
            script.add_lora(seen, lora.rank, lora.alpha, lora.targets)
            put_adapter(seen, model.adapter_state(lora.name))
        _checkpointed(seen.requires_grad_(False), own)
        del stage, model, objective, reward, _
        release()  # the script holds a model of its own

        def loss_of(features: Tensor, sigma: Tensor) -> Tensor:
            logits = head([features], sigma.expand(len(features)))
            return start.loss(shown(dict(zip(dimensions, logits.unbind(1), strict=True))))[0].mean()

        def step(policy: nn.Module) -> Tensor:
            return script.prfl_step(policy, seen, loss_of, start.noise, start.sigmas, start.text, chain // 2)

        return rival_work(own, start, step, [*seen.parameters(), *head.parameters()])

    return _rival_problem(world, own, rival)


def rival_vader(world: str, frames: int, chain: int) -> Problem:
    """VADER's own step, K = 1, beside the joint graph's; of Wan's videos the first latent frame is decoded, since the
    rival's decoder keeps everything."""
    seen = "one" if world.startswith("wan") else "all"
    own = _rival_config(world, frames, chain, f"{{name: vader, last_steps: 1, frames: {seen}}}", PIXEL)

    def rival() -> Work:
        stage = Stage(world)
        (model, *_), objective = stage.model(own), stage.objective(own)
        start, reward = given(own, model, objective), objective.scorer.reward  # type: ignore[attr-defined]
        assert isinstance(reward, PixelReward)
        read = reward.logits if _logits(own) else reward
        shown, times = (1, torch.zeros(1)) if seen == "one" else (start.noise.shape[2], None)
        script, vae = _script(), worlds.decoder(own)
        del stage, model, objective, _
        release()

        def loss_of(pixels: Tensor) -> Tensor:
            return start.loss(read(pixels, start.condition, times))[0].mean()

        def step(policy: nn.Module) -> Tensor:
            return script.vader_step(policy, vae, loss_of, start.noise, start.sigmas, start.text, 1, shown)

        return rival_work(own, start, step, [*vae.parameters(), *reward.network.parameters()])

    return _rival_problem(world, own, rival)


def _rival_config(world: str, frames: int, chain: int, objective: str, *more: str) -> Config:
    size = f"data.frames={frames}", f"rollout.steps={chain}"
    return worlds.config(world, (*size, f"objective={objective}", *more))


def _logits(own: Config) -> bool:
    return own.reward is not None and own.reward.aggregate == "logsigmoid"


def _rival_problem(world: str, own: Config, rival: Callable[[], Work]) -> Problem:
    works = {RIVAL: rival, OURS: lambda: step_work(Stage(world), own, frame=0, agreeing=True)}
    half = own.backbone.dtype != "float32"
    return _problem(works, RIVAL, own, worlds.weights(own), tolerance=0.1 if half else 1e-3)


def rival_work(own: Config, start: Given, step: Callable[[nn.Module], Tensor], constant: Sequence[Tensor]) -> Work:
    """step: takes the policy, leaves its gradients, gives the loss."""
    policy, lora = worlds.transformer(own), own.backbone.adapter
    assert lora is not None
    _script().add_lora(policy, lora.rank, lora.alpha, lora.targets)
    put_adapter(policy, start.adapter)
    _checkpointed(policy, own)
    trained = Trained(own_adapter(policy))

    def run(_: Any) -> Outputs:
        trained.optimizer.zero_grad()
        loss = step(policy)
        outputs = {"loss": loss, **trained.gradients()}
        apply(trained.optimizer, RATE)
        return outputs

    return Work(run, trained.put_back, [*policy.parameters(), *constant], check=trained.wrong)


def _script() -> Any:
    return import_module("rival")  # beside the benchmarks, in bench/


def _checkpointed(network: Any, own: Config) -> None:
    """Where ours is: the same trick on both sides."""
    if own.backbone.checkpointing != "none":
        network.enable_gradient_checkpointing()


def own_adapter(network: nn.Module) -> dict[str, nn.Parameter]:
    """peft's parameters by the names that ours have: without the adapter's own."""
    return {name.replace(".default.", "."): p for name, p in network.named_parameters() if ".lora_" in name}


def put_adapter(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = own_adapter(network)
    assert own.keys() == state.keys()
    for name, parameter in own.items():
        parameter.data.copy_(state[name])
