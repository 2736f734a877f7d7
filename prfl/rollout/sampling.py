"""Sampling from a backbone, with or without an adapter, from noise that depends on (seed, prompt, sample index) alone.

So samples are paired by their noise: base and policy, two checkpoints, or two guidance scales start alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone import Backbone
from prfl.backbone.condition import unconditional
from prfl.backbone.flow_form import ended
from prfl.backbone.guidance_scale import Scale, read_scale, scale_at
from prfl.backbone.network import on_host
from prfl.rollout.guidance import guided_network
from prfl.rollout.solvers import SOLVERS, SolverSchedule
from prfl.rollout.trajectory import rollout
from prfl.utils import rng

Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps a sequence of batches and shows its progress (``rich.progress.track``); ``iter`` shows nothing."""


@dataclass(frozen=True)
class SamplingSettings:
    """How videos are sampled.

    frames, height, width: of the video.  shift: None is the backbone's own.  guidance_scale: 1 is no guidance.
    solver: one without noise, so that compared samples differ only in what is compared.
    """

    frames: int
    height: int
    width: int
    steps: int
    shift: float | None = None
    guidance_scale: Scale = 1.0
    batch: int = 32
    seed: int = 0
    solver: str = "euler"

    @staticmethod
    def read(saved: Mapping[str, Any]) -> SamplingSettings:
        """Return the settings that ``asdict`` made a dict of, also after a round trip through JSON."""
        scale = read_scale(saved.get("guidance_scale", SamplingSettings.guidance_scale))
        return SamplingSettings(**{**saved, "guidance_scale": scale})

    def chain(self, backbone: Backbone, shape: Sequence[int]) -> SolverSchedule:
        """Return the chain's schedule.  shape: (c, t, h, w) of the latents, by which some families shift."""
        return SOLVERS[self.solver](backbone.sigmas(self.steps, shape, self.shift))


def jobs(prompts: Sequence[str], per_prompt: int) -> tuple[list[str], list[int]]:
    """Return the prompt and the sample index of every sample, prompt by prompt, as ``sample`` takes them."""
    return [p for p in prompts for _ in range(per_prompt)], [i for _ in prompts for i in range(per_prompt)]


def start_noise(
    shape: Sequence[int], seed: int, prompts: Sequence[str], indices: Sequence[int]
) -> Float[Tensor, "b ..."]:
    """Return standard normal latents.  Sample ``i`` of a prompt has the same noise in every batch and order."""
    each = [rng.normal(shape, seed, f"sample/{p}", 0, [i]) for p, i in zip(prompts, indices, strict=True)]
    return torch.cat(each)


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: Sequence[str],
    indices: Sequence[int],
    settings: SamplingSettings,
    *,
    adapter: str | None = None,
    progress: Progress = iter,
) -> Float[Tensor, "n c t h w"]:
    """Sample clean latents, float32 on the CPU, ready to be decoded.

    indices: for each prompt, the number of the sample among those of its prompt.  adapter: None is the base.
    """
    shape = backbone.latent_shape(settings.frames, settings.height, settings.width)
    schedule, scale = settings.chain(backbone, shape), scale_at(backbone.facts, settings.guidance_scale)
    done = []
    with backbone.adapter(adapter):
        for start in progress(range(0, len(prompts), settings.batch)):
            batch_prompts = list(prompts[start : start + settings.batch])
            noise = start_noise(shape, settings.seed, batch_prompts, indices[start : start + settings.batch])
            condition = backbone.condition(batch_prompts)
            network = guided_network(
                backbone.velocity,
                condition,
                backbone.condition(unconditional(batch_prompts)) if scale != 1 else None,
                scale=scale,
                gradient="both",
            )
            first = backbone.start(noise.to(backbone.facts.device), condition, float(schedule.sigmas[0]))
            trajectory = rollout(network, first, schedule, keep=set())
            done.append(ended(backbone.facts, trajectory.at(settings.steps), float(schedule.sigmas[-1])).float().cpu())
    return torch.cat(done)


@torch.no_grad()
def decode_all(
    backbone: Backbone, latents: Float[Tensor, "n c t h w"], batch: int = 32, progress: Progress = iter
) -> Float[Tensor, "n 3 f H W"]:
    """Decode latents to the pixels that people see: clamped to [-1, 1], float32 on the CPU.

    With ``running.offload`` the transformer waits on the host: decoding 81 frames of 720p takes 18 GiB.
    """
    parts = []
    with on_host(backbone) if backbone.running.offload else nullcontext():
        for start in progress(range(0, len(latents), batch)):
            pixels = backbone.decode(latents[start : start + batch].to(backbone.facts.device))
            parts.append(pixels.float().clamp(-1, 1).cpu())
    return torch.cat(parts)
