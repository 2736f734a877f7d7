"""PRFL's and VADER's step beside the same in one joint graph (bench/rival.py), with loss and gradients that agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases.step_problem import PIXEL, RATE, Stage, Trained, first_indices, first_step, middle, problem, step_work
from bench.harness import worlds
from bench.harness.measure import release
from bench.harness.problem import Outputs, Problem, Unavailable, Work
from prfl.backbone import Backbone, Condition
from prfl.backbone.condition import pad_to
from prfl.backbone.wan.model import TEXT_TOKENS
from prfl.config.schema import Config
from prfl.factory.backbone import POLICY
from prfl.factory.rollout import chain_shift
from prfl.objective.loss import RewardLoss
from prfl.objective.reward_gradient import RewardGradient
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelReward
from prfl.rollout.flow import chain_sigmas
from prfl.training.optimizer import apply

OURS, RIVAL, KERNELS = "ours", "rival", "ours_kernels"
PROVIDERS = RIVAL, OURS, KERNELS
NAMES = {KERNELS: "ours, kernels"}


@dataclass(frozen=True)
class Given:
    """What both sides start from.  text: padded as WanPipeline pads it.  adapter: the policy's weights."""

    noise: Tensor
    text: Tensor
    condition: Condition
    sigmas: Tensor
    adapter: dict[str, Tensor]
    loss: RewardLoss


def given(own: Config, model: Backbone, objective: RewardGradient) -> Given:
    step = first_step(objective, own, 0)
    _, condition, noise = objective.draw(step, first_indices(own, step))
    sigmas = chain_sigmas(own.rollout.steps, chain_shift(own, model)).to(noise)
    text = pad_to(condition.prompt_embeds, TEXT_TOKENS)
    return Given(noise, text, condition, sigmas, model.adapter_state(POLICY), objective.loss)


def rival_prfl(world: str, frames: int, chain: int) -> Problem:
    """PRFL's own step beside the joint graph's."""
    size = f"data.frames={frames}", f"rollout.steps={chain}"
    overrides = *size, f"objective={{name: prfl, steps_range: {middle(chain)}}}"
    own = worlds.config(world, overrides)

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

    return _rival_problem(world, overrides, rival)


def rival_vader(world: str, frames: int, chain: int) -> Problem:
    """VADER's own step, K = 1, beside the joint graph's; of Wan's videos the first latent frame is decoded, since the
    rival's decoder keeps everything."""
    seen = "one" if world.startswith("wan") else "all"
    size = f"data.frames={frames}", f"rollout.steps={chain}"
    overrides = *size, PIXEL, f"objective={{name: vader, last_steps: 1, frames: {seen}}}"
    own = worlds.config(world, overrides)

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

    return _rival_problem(world, overrides, rival)


def _logits(own: Config) -> bool:
    return own.reward is not None and own.reward.aggregate == "logsigmoid"


def _rival_problem(world: str, overrides: Sequence[str], rival: Callable[[], Work]) -> Problem:
    own = worlds.config(world, overrides)

    def ours(*more: str) -> Work:
        return step_work(Stage(world), worlds.config(world, [*overrides, *more]), frame=0, agreeing=True)

    def kernels() -> Work:
        if not torch.cuda.is_available():
            raise Unavailable("the kernels run on a GPU, and there is none here")
        return ours("backbone.kernels=triton")

    works = {RIVAL: rival, OURS: ours, KERNELS: kernels}
    half = own.backbone.dtype != "float32"
    return problem(works, RIVAL, own, worlds.weights(own), names=NAMES, tolerance=0.1 if half else 1e-3)


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

    constant = [*policy.parameters(), *constant]
    return Work(run, trained.put_back, constant, check=trained.wrong, forget=trained.forget)


def _script() -> Any:
    return import_module("bench.rival")  # beside the benchmarks, in bench/


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
