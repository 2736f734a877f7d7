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
from prfl.backbone.adapters import state_of
from prfl.backbone.condition import EMBEDS
from prfl.backbone.wan.text import TEXT_TOKENS, pad_to
from prfl.config.schema import Config
from prfl.factory.backbone import POLICY
from prfl.factory.rollout import chain_sigmas
from prfl.objective.loss import RewardLoss
from prfl.objective.reward_gradient import RewardGradient
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelReward
from prfl.training.optimizer import apply

OURS, RIVAL, KERNELS = "ours", "rival", "ours_kernels"
PROVIDERS = RIVAL, OURS, KERNELS
NAMES = {KERNELS: "ours, kernels"}


@dataclass(frozen=True)
class Start:
    """The numbers that both sides start from.  text: padded as WanPipeline pads it.  adapter: the policy's weights."""

    noise: Tensor
    text: Tensor
    condition: Condition
    sigmas: Tensor
    adapter: dict[str, Tensor]
    loss: RewardLoss


def starting_point(config: Config, model: Backbone, objective: RewardGradient) -> Start:
    """Draw the noise and the prompts of the first step, as the objective does."""
    step = first_step(objective, config, 0)
    _, condition, noise = objective.draw(step, first_indices(config, step))
    sigmas = chain_sigmas(config, model).to(noise)
    text = pad_to(condition.tensors[EMBEDS], TEXT_TOKENS)
    return Start(noise, text, condition, sigmas, state_of(model.parameters(POLICY)), objective.loss)


def rival_prfl(world: str, frames: int, chain: int) -> Problem:
    """Compare PRFL's step with the joint graph's."""
    size = f"data.frames={frames}", f"rollout.steps={chain}"
    overrides = *size, f"objective={{name: prfl, steps_range: {middle(chain)}}}"
    config = worlds.config(world, overrides)

    def rival() -> Work:
        stage = Stage(world)
        (model, *_), objective = stage.model(config), stage.objective(config)
        start, reward = starting_point(config, model, objective), objective.scorer.reward  # type: ignore[attr-defined]
        assert isinstance(reward, LatentReward) and len(reward.blocks) == 1
        head, dimensions = reward.head, reward.dimensions
        shown = dict if _logits(config) else reward.normalisation.apply
        script, lora = _script(), reward.adapter
        reward_network = worlds.transformer(config)
        reward_network.blocks = reward_network.blocks[: reward.blocks[0] + 1]  # a second model, as public code has it
        if lora:
            script.add_lora(reward_network, lora.rank, lora.alpha, lora.targets)
            put_adapter(reward_network, state_of(model.parameters(lora.name)))
        _checkpointed(reward_network.requires_grad_(False), config)
        del stage, model, objective, reward, _
        release()  # the script holds a model of its own

        def loss_of(features: Tensor, sigma: Tensor) -> Tensor:
            logits = head([features], sigma.expand(len(features)))
            return start.loss(shown(dict(zip(dimensions, logits.unbind(1), strict=True))))[0].mean()

        def step(policy: nn.Module) -> Tensor:
            return script.prfl_step(policy, reward_network, loss_of, start.noise, start.sigmas, start.text, chain // 2)

        return rival_work(config, start, step, [*reward_network.parameters(), *head.parameters()])

    return _rival_problem(world, overrides, rival)


def rival_vader(world: str, frames: int, chain: int) -> Problem:
    """Compare VADER's step, K = 1, with the joint graph's.

    Of Wan's videos the first latent frame is decoded, since the rival's decoder keeps everything.
    """
    frames_read = "one" if world.startswith("wan") else "all"
    size = f"data.frames={frames}", f"rollout.steps={chain}"
    overrides = *size, PIXEL, f"objective={{name: vader, last_steps: 1, frames: {frames_read}}}"
    config = worlds.config(world, overrides)

    def rival() -> Work:
        stage = Stage(world)
        (model, *_), objective = stage.model(config), stage.objective(config)
        start, reward = starting_point(config, model, objective), objective.scorer.reward  # type: ignore[attr-defined]
        assert isinstance(reward, PixelReward)
        read = reward.logits if _logits(config) else reward
        shown, times = (1, torch.zeros(1)) if frames_read == "one" else (start.noise.shape[2], None)
        script, vae = _script(), worlds.decoder(config)
        del stage, model, objective, _
        release()

        def loss_of(pixels: Tensor) -> Tensor:
            return start.loss(read(pixels, start.condition, times))[0].mean()

        def step(policy: nn.Module) -> Tensor:
            return script.vader_step(policy, vae, loss_of, start.noise, start.sigmas, start.text, 1, shown)

        return rival_work(config, start, step, [*vae.parameters(), *reward.network.parameters()])

    return _rival_problem(world, overrides, rival)


def _logits(config: Config) -> bool:
    return config.reward is not None and config.reward.aggregate == "logsigmoid"


def _rival_problem(world: str, overrides: Sequence[str], rival: Callable[[], Work]) -> Problem:
    config = worlds.config(world, overrides)

    def ours(*more: str) -> Work:
        return step_work(Stage(world), worlds.config(world, [*overrides, *more]), frame=0, agreeing=True)

    def kernels() -> Work:
        if not torch.cuda.is_available():
            raise Unavailable("the kernels run on a GPU, and there is none here")
        return ours("backbone.kernels=triton")

    works = {RIVAL: rival, OURS: ours, KERNELS: kernels}
    half = config.backbone.dtype != "float32"
    return problem(works, RIVAL, config, worlds.weights(config), names=NAMES, tolerance=0.1 if half else 1e-3)


def rival_work(config: Config, start: Start, step: Callable[[nn.Module], Tensor], constant: Sequence[Tensor]) -> Work:
    """Make a benchmark's work of the joint graph.  step: takes the policy, leaves its gradients, gives the loss."""
    policy, lora = worlds.transformer(config), config.backbone.adapter
    assert lora is not None
    _script().add_lora(policy, lora.rank, lora.alpha, lora.targets)
    put_adapter(policy, start.adapter)
    _checkpointed(policy, config)
    trained = Trained(adapter_parameters(policy))

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


def _checkpointed(network: Any, config: Config) -> None:
    """Checkpoint the network where ours is: the same trick on both sides."""
    if config.backbone.checkpointing != "none":
        network.enable_gradient_checkpointing()


def adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return peft's parameters by the names that ours have: without the name of the adapter."""
    return {name.replace(".default.", "."): p for name, p in network.named_parameters() if ".lora_" in name}


def put_adapter(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    parameters = adapter_parameters(network)
    assert parameters.keys() == state.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(state[name])
