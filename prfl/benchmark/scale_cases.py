"""What a step costs against its size: frames, resolution, solver steps, gradient steps, batch, one at a time.

PRFL's step with a latent reward, and VADER's with a pixel reward on all frames.  PRFL trains the step in the middle of
its chain, which a drawn one is on average; along ``gradients`` the last steps, exactly, with its reward at the end.
Rewards are new: trained ones refuse videos that are not like theirs.  A step here is rollout, reward and
gradient; the optimizer's part no axis but the model's size changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch

from prfl import build
from prfl.benchmark import worlds
from prfl.benchmark.problem import Case, Outputs, Problem, Work
from prfl.forecast.memory import reward_tensors

LATENT, PIXEL = "prfl", "vader"
NAMES = {LATENT: "PRFL, latent reward", PIXEL: "VADER, pixel reward"}
STEP = 1  # not 0, in which the distance to the base is measured, too
FRAMES = {"tiny": 17, "small": 17, "wan-1.3b": 33, "wan-14b": 33}  # of Wan's 81: a decoder's backward pass is long
FIXED = "reward.path=new", "rollout.steps=4", "training.batch=1"
COUNTS = {"steps": (2, 4, 8), "gradients": (1, 2, 4), "batch": (1, 2, 4)}
VALUES: Mapping[str, Mapping[str, Sequence[int | str]]] = {
    "tiny": {"frames": (5, 9, 17), "resolution": ("16x16", "24x24", "32x32"), **COUNTS},
    "small": {"frames": (5, 9, 17), "resolution": ("64x64", "96x96", "128x128"), **COUNTS},
    "wan-1.3b": {"frames": (17, 33, 49, 81), "resolution": ("240x416", "480x832", "720x1280"), **COUNTS},
    "wan-14b": {"frames": (17, 33, 49, 81), "resolution": ("240x416", "480x832", "720x1280"), **COUNTS},
}


def cases(world: str) -> list[Case]:
    needs = worlds.WORLDS[world].needs
    return [
        Case("scale", scale, {"world": world, "axis": axis, "value": value}, providers(axis), needs)
        for axis, values in VALUES[world].items()
        for value in values
    ]


def providers(axis: str) -> tuple[str, ...]:
    """VADER's step where it is the decoder that grows."""
    return (LATENT, PIXEL) if axis in ("frames", "resolution") else (LATENT,)


def overrides(world: str, axis: str, value: Any) -> list[str]:
    """Of the world's config, what both methods share."""
    height, width = value.split("x") if axis == "resolution" else (0, 0)
    own = {
        "frames": [f"data.frames={value}"],
        "resolution": [f"data.height={height}", f"data.width={width}"],
        "steps": [f"rollout.steps={value}"],
        "gradients": [],
        "batch": [f"training.batch={value}"],
    }
    return [*FIXED, f"data.frames={FRAMES[world]}", *own[axis]]


def method(provider: str, axis: str, value: Any, steps: int) -> list[str]:
    """Overrides of a method."""
    if provider == PIXEL:
        return ["reward={space: pixel, path: new}", "objective={name: vader}"]
    if axis == "gradients":
        return [f"objective={{name: vader, last_steps: {value}}}"]
    middle = [(steps // 2 + part) / steps for part in (0.25, 0.75)]  # the shares of one step
    return [f"objective={{name: prfl, steps_range: {middle}}}"]


def scale(world: str, axis: str, value: Any) -> Problem:
    shared = overrides(world, axis, value)
    plain = worlds.config(world, shared)
    model = cache(lambda: worlds.backbone(plain))  # both work on the same weights

    def step(provider: str) -> Work:
        own = worlds.config(world, [*shared, *method(provider, axis, value, plain.rollout.steps)])
        reward = worlds.reward(world, own, model())
        objective = build.steering(own, model(), reward, None)
        parameters = objective.parameters().values()
        samples = range(own.training.batch)

        def run(_: Any) -> Outputs | None:
            for parameter in parameters:
                parameter.grad = None
            objective.accumulate(STEP, samples)
            norms = torch.stack([p.grad.norm() for p in parameters if p.grad is not None])
            return {"gradient": norms} if provider == LATENT else None  # of another objective: not compared

        modules = model().transformer, model().vae
        return Work(run, constant=[*(p for each in modules for p in each.parameters()), *reward_tensors(reward)])

    size = plain.data.frames, plain.data.height, plain.data.width
    return Problem(
        {name: partial(step, name) for name in NAMES}, LATENT, getattr(torch, plain.backbone.dtype), names=NAMES,
        shapes={"videos": (plain.training.batch, *size), "solver steps": (plain.rollout.steps,)},
        weights=worlds.weights(plain),
    )  # fmt: skip
