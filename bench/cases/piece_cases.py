"""The pieces of a step by themselves: a score with its gradient, the decoder, one gradient call of the transformer.

``score``: the reward's gradient at the latents, a latent reward beside a pixel reward on the decoded video.  These are
different rewards, so nothing is compared there; elsewhere all providers compute the same thing.
``decode``: latents to pixels, frame by frame with its cache, with our checkpoints between the frames and without.
``gradient_call``: the transformer forward and backward under the policy's adapter, by what it keeps for that and where.
``steer``: one of four chains is chosen half way, by the latent reward, by the pixel reward at clean predictions, or
by chance.  Seconds are those of one network call of the chains, so what a look adds to it shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from itertools import count, product
from typing import Any

import torch
from torch import Tensor

from bench.cases import step_problem
from bench.cases.scale_cases import FRAMES
from bench.harness import worlds
from bench.harness.problem import Case, Outputs, Problem, Unavailable, Work, differentiated
from prfl.backbone import Backbone, Condition
from prfl.backbone.kernels import use_kernels
from prfl.backbone.wan.kernels import SWAPPED
from prfl.config.schema import Config
from prfl.data.conditions import remember
from prfl.estimate.memory import reward_tensors
from prfl.factory.backbone import POLICY, attention_choice
from prfl.factory.evaluation import sampling_settings
from prfl.factory.objective import build_reward_gradient
from prfl.factory.prompts import load_prompts
from prfl.factory.steering import look_of
from prfl.objective.loss import loss_gradient
from prfl.reward.frames import decode_frames, draw_frames
from prfl.steering.best_of import BestOf
from prfl.steering.budget import calls_of
from prfl.steering.calls import Prices
from prfl.steering.looks import random_look
from prfl.steering.process import Look
from prfl.steering.sampling import process_of

LATENT, ONE, FOUR, ALL = "latent reward", "pixel reward, 1 frame", "pixel reward, 4 frames", "pixel reward, all frames"
PIXEL: Mapping[str, str | int] = {ONE: "one", FOUR: 4, ALL: "all"}
PLAIN, CHECKPOINTED = "plain", "checkpointed"
OFFLOAD, KERNELS = "offload", "kernels"
CALLS = (  # a mode of checkpointing, and what is on with it
    "full", "none", "attention", f"full, {OFFLOAD}", f"attention, {OFFLOAD}", f"none, {KERNELS}", f"full, {KERNELS}",
    f"full, {OFFLOAD}, {KERNELS}",
)  # fmt: skip
LENGTHS = {**FRAMES, "tiny": 17}  # five latent frames, so that four of them are not all
DECODED, CHANCE = "pixel reward, clean prediction", "chance"
CHOSEN, CHAIN = BestOf(4, decide_at=(0.5,)), 6  # steps
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


def cases(world: str) -> list[Case]:
    settings, needs = {"world": world}, worlds.WORLDS[world].needs
    decoding = []
    for frames, mode in product(("one", "all"), ("forward", "backward")):
        # The peak of a backward pass is that of both: its forward pass runs before it.
        of_decode = {**settings, "frames": frames, "mode": mode}
        decoding.append(Case("decode", decode, of_decode, (CHECKPOINTED, PLAIN), needs, memory=mode != "forward"))
    scoring = Case("score", score, settings, (LATENT, *PIXEL), needs)
    steering = Case("steer", steer, settings, (LATENT, DECODED, CHANCE), needs)
    return [scoring, *decoding, Case("gradient_call", gradient_call, settings, CALLS, needs), steering]


def config(world: str, *overrides: str) -> Config:
    """Return a config whose batch is one video."""
    return worlds.config(world, ["training.batch=1", f"data.frames={LENGTHS[world]}", *overrides])


def inputs(config: Config, model: Backbone) -> tuple[Tensor, Condition]:
    """Draw latents of noise, and encode prompts."""
    shape = model.latent_shape(config.data.frames, config.data.height, config.data.width)
    noise = torch.randn(config.training.batch, *shape, generator=torch.Generator().manual_seed(0)).to(
        model.facts.device
    )
    prompts = load_prompts(config.data)["train"][: len(noise)]
    remember(model, prompts)
    return noise.to(model.facts.device), model.condition(prompts)


def weights(model: Backbone) -> list[Tensor]:
    return [parameter for network in model.networks.values() for parameter in network.parameters()]


def facts(config: Config, latents: Tensor) -> dict[str, Any]:
    """Return what every problem here says of itself."""
    size = config.data.frames, config.data.height, config.data.width
    shapes = {"videos": (config.training.batch, *size), "latents": tuple(latents.shape)}
    dtype = getattr(torch, config.backbone.dtype)
    return {"dtype": dtype, "tolerance": TOLERANCE[dtype], "shapes": shapes, "weights": worlds.weights(config)}


def score(world: str) -> Problem:
    plain = config(world)
    model = worlds.backbone(plain)
    latents, condition = inputs(plain, model)
    frames = latents.shape[2]
    # A draw of the frame in the middle: how many are decoded before it depends on the draw.
    step = next(step for step in count() if draw_frames(frames, "one", plain.seed, step) == [frames // 2])

    def work(provider: str) -> Work:
        pixel = (
            step_problem.PIXEL,
            f"objective={{name: vader, frames: {PIXEL.get(provider)}}}",
        )
        of_provider = plain if provider == LATENT else config(world, *pixel)
        reward = worlds.reward(world, of_provider, model)
        objective = build_reward_gradient(of_provider, model, reward, None)
        sigma = torch.tensor(0.5 if provider == LATENT else 0.0, device=model.facts.device)

        def run(_: Any) -> Outputs | None:
            gradient, _ = loss_gradient(objective.scorer, objective.loss, latents, sigma, condition, step)
            return {"gradient": gradient} if provider == LATENT else None

        return Work(run, constant=[*weights(model), *reward_tensors(reward)])

    return Problem({name: partial(work, name) for name in (LATENT, *PIXEL)}, LATENT, **facts(plain, latents))


def decode(world: str, frames: str, mode: str) -> Problem:
    settings = config(world)
    model = worlds.backbone(settings)
    latents, _ = inputs(settings, model)
    latents = latents.requires_grad_()
    length = latents.shape[2]
    chosen = [length // 2] if frames == "one" else list(range(length))
    with torch.no_grad():
        upstream = torch.randn_like(decode_frames(model, latents, chosen)[0])

    def work(provider: str) -> Work:
        def call() -> Outputs:
            model.running.checkpointing = "full" if provider == CHECKPOINTED else "none"
            return {"pixels": decode_frames(model, latents, chosen)[0]}

        return differentiated(call, {"latents": latents}, {"pixels": upstream}, mode, weights(model))

    works = {name: partial(work, name) for name in (CHECKPOINTED, PLAIN)}
    return Problem(works, CHECKPOINTED, **facts(settings, latents))


def gradient_call(world: str) -> Problem:
    settings = config(world)
    model = worlds.backbone(settings)
    latents, condition = inputs(settings, model)
    latents, upstream = latents.requires_grad_(), torch.randn_like(latents)
    sigma = torch.tensor(0.5, device=model.facts.device)
    trained = list(model.parameters(POLICY).values())
    chosen = cache(lambda: attention_choice(settings, model).backend)

    def work(provider: str) -> Work:
        mode, *more = provider.split(", ")
        if OFFLOAD in more and model.facts.device.type != "cuda":
            raise Unavailable("offloading moves what a GPU keeps, and there is none here")

        def arrange() -> None:
            model.running.checkpointing, model.running.offload = mode, OFFLOAD in more  # type: ignore[assignment]
            use_kernels(model, SWAPPED if KERNELS in more else (), chosen())

        def run(_: Any) -> Outputs:
            with model.adapter(POLICY):
                velocity = model.velocity(latents, sigma, condition)
                of_latents, *of_adapter = torch.autograd.grad(velocity, [latents, *trained], upstream)
            flat = torch.cat([gradient.flatten() for gradient in of_adapter])
            return {"velocity": velocity.detach(), "d latents": of_latents, "d adapter": flat}

        return Work(run, arrange, weights(model))

    named = {} if torch.cuda.is_available() else {name: f"{name} (torch path)" for name in CALLS if KERNELS in name}
    return Problem({name: partial(work, name) for name in CALLS}, CALLS[0], names=named, **facts(settings, latents))


def steer(world: str) -> Problem:
    plain = config(world, f"evaluation.steps={CHAIN}")
    model = worlds.backbone(plain)
    latents, condition = inputs(plain, model)
    settings = sampling_settings(plain)
    schedule = settings.chain(model, latents.shape[1:])
    prompts = [ask.prompt for ask in condition.asks]

    def look_by(provider: str) -> Look:
        if provider == CHANCE:
            return random_look(0)
        of_provider = plain if provider == LATENT else config(world, step_problem.PIXEL, "objective={name: vader}")
        return look_of(worlds.reward(world, of_provider, model), model)

    def work(provider: str) -> Work:
        look = look_by(provider)
        chain_calls = calls_of(CHOSEN, schedule, [look], Prices()).policy

        def run(_: Any) -> Outputs | None:
            process = process_of(model, prompts, [0] * len(prompts), settings, schedule, [look], adapter=POLICY)
            with torch.no_grad():
                steered = CHOSEN(process)
            return {"kept": steered.kept.latents} if provider == LATENT else None

        return Work(run, constant=weights(model), repeats=round(chain_calls))

    works = {name: partial(work, name) for name in (LATENT, DECODED, CHANCE)}
    return Problem(works, LATENT, **facts(plain, latents))
