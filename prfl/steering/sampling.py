"""Steered samples of a backbone: its network, condition and latents for ``Process``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from prfl.backbone import Backbone, Condition, Facts
from prfl.backbone.condition import unconditional
from prfl.backbone.flow_form import ended, start_size
from prfl.backbone.guidance_scale import Scale, branches_at, scale_at
from prfl.rollout.guidance import guided_network
from prfl.rollout.sampling import SamplingSettings
from prfl.rollout.solvers import SolverSchedule
from prfl.steering.budget import Method
from prfl.steering.calls import Prices
from prfl.steering.chains import Steered
from prfl.steering.process import Look, Process


def prices_of(facts: Facts, scale: Scale, decode_price: float = 0.0) -> Prices:
    """What a step costs under this guidance, which one of two experts may be without."""
    step_at = partial(branches_at, facts, scale)
    return Prices(float(max(step_at(1.0), step_at(0.0))), decode_price, step_at)


def process_of(
    backbone: Backbone,
    prompts: Sequence[str],
    indices: Sequence[int],
    settings: SamplingSettings,
    schedule: SolverSchedule,
    looks: Sequence[Look],
    *,
    adapter: str | None = None,
    decode_price: float = 0.0,
) -> Process:
    """Chains of these videos.  indices: which sample of its prompt each is.  adapter: None is the base."""
    scale = scale_at(backbone.facts, settings.guidance_scale)
    empties = {ask: backbone.condition([ask]) for ask in unconditional(prompts)} if scale != 1 else {}
    held = partial(backbone.adapter, adapter)

    def network(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        empty = Condition.cat([empties[ask.unconditional] for ask in condition.asks]) if scale != 1 else None
        guided = guided_network(backbone.velocity, condition, empty, scale=scale, gradient="both")
        with held():
            return guided(latents, sigma)

    def begin(noise: Tensor, condition: Condition) -> Tensor:
        return backbone.start(noise.to(backbone.facts.device), condition, float(schedule.sigmas[0]))

    return Process(
        network,
        schedule,
        looks,
        backbone.condition(list(prompts)),
        list(indices),
        backbone.latent_shape(settings.frames, settings.height, settings.width),
        settings.seed,
        prices_of(backbone.facts, settings.guidance_scale, decode_price),
        settings.batch,
        begin,
        partial(ended, backbone.facts, sigma=float(schedule.sigmas[-1])),
        start_size(backbone.facts, float(schedule.sigmas[0])),
        held,
    )


def steer(
    backbone: Backbone,
    prompts: Sequence[str],
    indices: Sequence[int],
    method: Method,
    settings: SamplingSettings,
    schedule: SolverSchedule,
    looks: Sequence[Look],
    **options: object,
) -> Iterator[tuple[list[int], Steered]]:
    """Steer the videos, as many at once as fill a batch.  Gives the numbers of those videos, and what became of them.

    options: of ``process_of``.
    """
    together = max(1, settings.batch // method.chains)
    for first in range(0, len(prompts), together):
        numbers = list(range(first, min(first + together, len(prompts))))
        process = process_of(
            backbone,
            [prompts[i] for i in numbers],
            [indices[i] for i in numbers],
            settings,
            schedule,
            looks,
            **options,  # type: ignore[arg-type] # named in process_of
        )
        with torch.no_grad():
            steered = method(process)
        yield numbers, steered
