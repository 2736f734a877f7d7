"""Training steps: a latent against a pixel reward in the same step, the methods as they are, and the plain rival."""

from __future__ import annotations

from functools import cache, partial

import torch

from bench.cases.rival_cases import PROVIDERS, rival_prfl, rival_vader
from bench.cases.step_problem import PIXEL, Stage, middle, problem, step_work
from bench.harness import worlds
from bench.harness.problem import Case, Problem, Unavailable, Work
from prfl.backbone.kernels import use_kernels
from prfl.backbone.wan.kernels import SWAPPED
from prfl.config.schema import Config
from prfl.factory.backbone import attention_choice

LATENT, PRFL = "latent", "prfl"
REUSED = 4
SCORED = 1e-6  # of the largest: latents of one rollout are the same numbers, whatever reads them
SIZES = {  # frames and steps of the chain: of the same step, of the methods, of the rival
    "tiny": ((17, 6), (17, 6), (17, 6)),
    "small": ((17, 6), (17, 6), (17, 6)),
    "wan-1.3b": ((81, 4), (81, 12), (81, 4)),
    # Of 81 frames a full chain takes minutes a step, and a pixel reward on all of them needs 146 GiB.
    "wan-14b": ((49, 4), (33, 8), (81, 4)),
}
PLAIN = "pixel_plain"
KERNELS = "kernels"
MODES = ("full", f"full, {KERNELS}", f"attention, {KERNELS}")  # of checkpointing, and what is on with it
AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # loss and gradients of one step in two modes
SAME = {LATENT: "", "pixel_1": "one", "pixel_4": "4", "pixel_all": "all", PLAIN: "all"}
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
    PLAIN: "pixel, all frames, plain decoder",
    "reuse": f"prfl, {REUSED} gradients a rollout", "full_chain": "full chain", "vader_1": "vader, K=1",
    "vader_5": "vader, K=5",
}  # fmt: skip


def cases(world: str) -> list[Case]:
    needs = worlds.WORLDS[world].needs
    same, methods_own, rival = ({"world": world, "frames": frames, "chain": chain} for frames, chain in SIZES[world])
    return [
        Case("same_step", same_step, same, tuple(SAME), needs),
        Case("step_modes", step_modes, rival, MODES, needs),
        Case("methods", methods, methods_own, tuple(METHODS), needs),
        Case("rival_prfl", rival_prfl, rival, PROVIDERS, needs),
        Case("rival_vader", rival_vader, rival, PROVIDERS, needs),
    ]


def same_step(world: str, frames: int, chain: int) -> Problem:
    """Compare rewards in one step of PRFL that hands its clean prediction over: all but the reward is the same.

    The same rollout, step, prompts and noise.  The pixel reward, too, is differentiated by itself, through a decoder
    that is chunked and checkpointed, so it decodes twice; where it fits there is one that keeps everything, too.
    """
    stage = Stage(world)

    def work(name: str) -> Work:
        if name == PLAIN and world.startswith("wan"):
            raise Unavailable("a decoder without checkpoints keeps everything of all frames: no GPU holds Wan's")
        return step_work(stage, same_config(world, frames, chain, name), alike=True, plain=name == PLAIN)

    works = {name: partial(work, name) for name in SAME}
    latent = same_config(world, frames, chain, LATENT)
    return problem(
        works, LATENT, latent, f"{worlds.weights(latent)}, pixel reward random", names=NAMES, tolerance=SCORED
    )


def same_config(world: str, frames: int, chain: int, provider: str) -> Config:
    """Return the config of one of ``same_step``'s providers."""
    frames_read = SAME[provider]
    reward, frames_seen = ((PIXEL,), f", frames: {frames_read}") if frames_read else ((), "")
    objective = f"objective={{name: prfl, handoff: clean, steps_range: {middle(chain)}{frames_seen}}}"
    return worlds.config(world, (f"data.frames={frames}", f"rollout.steps={chain}", *reward, objective))


def step_modes(world: str, frames: int, chain: int) -> Problem:
    """Compare one step of PRFL by what is kept for the backward pass and by whose kernels: in time and memory."""
    config, stage = mode_config(world, frames, chain, MODES[0]), Stage(world)
    model = cache(lambda: stage.model(config)[0])
    backend = cache(lambda: attention_choice(config, model()).backend)

    def work(mode: str) -> Work:
        checkpointing, *more = mode.split(", ")
        step = step_work(stage, config, agreeing=True)

        def before() -> None:
            model().running.checkpointing = checkpointing  # type: ignore[assignment]
            use_kernels(model(), SWAPPED if KERNELS in more else (), backend())
            step.before()

        return step._replace(before=before)

    named = {} if torch.cuda.is_available() else {mode: f"{mode} (torch path)" for mode in MODES if KERNELS in mode}
    works = {mode: partial(work, mode) for mode in MODES}
    tolerance = AGREE[getattr(torch, config.backbone.dtype)]
    return problem(works, MODES[0], config, worlds.weights(config), names=named, tolerance=tolerance)


def mode_config(world: str, frames: int, chain: int, mode: str) -> Config:
    """Return the config that has one of ``step_modes``'s providers from the start."""
    checkpointing, *more = mode.split(", ")
    backbone = f"backbone.checkpointing={checkpointing}", f"backbone.kernels={'triton' if KERNELS in more else 'torch'}"
    objective = f"objective={{name: prfl, steps_range: {middle(chain)}}}"
    return worlds.config(world, (f"data.frames={frames}", f"rollout.steps={chain}", objective, *backbone))


def methods(world: str, frames: int, chain: int) -> Problem:
    """Measure each method as it is.  They compute different things: gradients are checked, not compared."""
    size = f"data.frames={frames}", f"rollout.steps={chain}", f"objective={{name: prfl, steps_range: {middle(chain)}}}"
    configs = {name: worlds.config(world, (*size, *overrides)) for name, overrides in METHODS.items()}
    stage = Stage(world)
    works = {name: lambda config=config: step_work(stage, config) for name, config in configs.items()}
    return problem(works, PRFL, configs[PRFL], f"{worlds.weights(configs[PRFL])}, pixel reward random", names=NAMES)
