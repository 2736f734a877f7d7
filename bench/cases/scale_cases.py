"""What a step costs against its size: frames, resolution, solver steps, gradient steps, batch, one at a time.

PRFL's step with a latent reward, and VADER's with a pixel reward on all frames.  PRFL trains the step in the middle of
its chain, which a drawn one is on average.  Along ``gradients`` it is VADER's plan with a latent reward: the last
steps, exactly, with the reward at the end.  Rewards are new: trained ones refuse videos that are not like theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from bench.cases import step_problem
from bench.cases.step_problem import Stage, middle, problem, step_work
from bench.harness import worlds
from bench.harness.problem import Case, Problem

LATENT, PIXEL = "prfl", "vader"
NAMES = {LATENT: "PRFL, latent reward", PIXEL: "VADER, pixel reward"}
LAST_STEPS = "VADER, latent reward"
FRAMES = {"tiny": 9, "small": 17, "wan-1.3b": 33, "wan-14b": 33}  # of Wan's 81: a decoder's backward pass is long
FIXED = "reward.path=new", "rollout.steps=4", "training.batch=1"
COUNTS = {"steps": (2, 4, 8), "gradients": (1, 2, 3, 4), "batch": (1, 2, 4)}
VALUES: Mapping[str, Mapping[str, Sequence[int | str]]] = {
    "tiny": {"frames": (5, 9, 17), "resolution": ("16x16", "24x24", "32x32"), **COUNTS},
    "small": {"frames": (5, 9, 17), "resolution": ("48x48", "64x64", "96x96"), **COUNTS},
    "wan-1.3b": {"frames": (17, 33, 49, 81), "resolution": ("240x416", "480x832", "720x1280"), **COUNTS},
    "wan-14b": {"frames": (17, 33, 49, 81), "resolution": ("240x416", "480x832", "720x1280"), **COUNTS},
}


def cases(world: str) -> list[Case]:
    needs = worlds.WORLDS[world].needs
    all_cases = []
    for axis, values in VALUES[world].items():
        for value in values:
            settings = {"world": world, "axis": axis, "value": value}
            all_cases.append(Case("scale", scale, settings, providers(axis), needs))
    return all_cases


def providers(axis: str) -> tuple[str, ...]:
    """VADER's step where it is the decoder that grows."""
    return (LATENT, PIXEL) if axis in ("frames", "resolution") else (LATENT,)


def overrides(world: str, axis: str, value: Any) -> list[str]:
    """Return the overrides of the world's config that both methods share."""
    height, width = value.split("x") if axis == "resolution" else (0, 0)
    by_axis = {
        "frames": [f"data.frames={value}"],
        "resolution": [f"data.height={height}", f"data.width={width}"],
        "steps": [f"rollout.steps={value}"],
        "gradients": [],
        "batch": [f"training.batch={value}"],
    }
    return [*FIXED, f"data.frames={FRAMES[world]}", *by_axis[axis]]


def method(provider: str, axis: str, value: Any, steps: int) -> list[str]:
    """Overrides of a method."""
    if provider == PIXEL:
        return [step_problem.PIXEL, "objective={name: vader}"]
    if axis == "gradients":
        return [f"objective={{name: vader, last_steps: {value}}}"]
    return [f"objective={{name: prfl, steps_range: {middle(steps)}}}"]


def scale(world: str, axis: str, value: Any) -> Problem:
    """Measure two methods, which compute two things: their gradients are checked, not compared."""
    shared = overrides(world, axis, value)
    plain, stage = worlds.config(world, shared), Stage(world)
    configs = {
        name: worlds.config(world, [*shared, *method(name, axis, value, plain.rollout.steps)])
        for name in providers(axis)
    }
    works = {name: partial(step_work, stage, config) for name, config in configs.items()}
    names = {**NAMES, LATENT: LAST_STEPS if axis == "gradients" else NAMES[LATENT]}
    return problem(works, LATENT, plain, f"{worlds.weights(plain)}, pixel reward random", names=names)
