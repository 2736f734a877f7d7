"""One score with its gradient, by each reward that others trained, beside the latent head's.

The networks have the published sizes and random weights, which take as long as trained ones.  A pixel reward's gradient
is that at the decoded pixels: the decoder is a piece by itself (piece_cases: ``decode``).  These are different rewards,
so nothing is compared.  On a CPU those are measured that take seconds there, on four frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from bench.cases.piece_cases import LATENT, config, facts, inputs, weights
from bench.harness import worlds
from bench.harness.problem import Case, Outputs, Problem, Work
from prfl.config.sections.public_rewards import CallableConfig, CriticConfig
from prfl.factory.objective import build_reward_gradient
from prfl.factory.reward import PUBLIC_REWARDS
from prfl.objective.loss import loss_gradient

ON_CPU = "action", "clip", "aesthetic", "imagereward"
# bench/study_critic.py measures the critic; a user's own function has no size.
KINDS: Mapping[str, Any] = {
    section.key.removeprefix("reward."): kind.untrained
    for section, kind in PUBLIC_REWARDS.items()
    if section not in (CallableConfig, CriticConfig)
}


def cases(world: str) -> list[Case]:
    names = ON_CPU if world == "tiny" else tuple(KINDS)
    return [Case("reward", reward, {"world": world}, (LATENT, *names), worlds.WORLDS[world].needs)]


def reward(world: str) -> Problem:
    plain = config(world)
    model = worlds.backbone(plain)
    latents, condition = inputs(plain, model)
    frames = 4 if world == "tiny" else plain.data.frames
    size = len(latents), 3, frames, plain.data.height, plain.data.width

    def of_latents() -> Work:
        objective = build_reward_gradient(plain, model, worlds.reward(world, plain, model), None)

        def run(_: Any) -> Outputs:
            sigma = torch.tensor(0.5, device=model.facts.device)
            return {"gradient": loss_gradient(objective.scorer, objective.loss, latents, sigma, condition, 0)[0]}

        return Work(run, constant=weights(model))

    def of_pixels(name: str) -> Work:
        with torch.device(model.facts.device):
            network = KINDS[name]()
            pixels = (torch.rand(size) - 0.5).requires_grad_()

        def run(_: Any) -> None:
            scores = network(pixels, condition)
            torch.autograd.grad(torch.stack(list(scores.values())).sum(), pixels)

        return Work(run, constant=[*weights(model), *network.parameters(), pixels])

    works = {name: partial(of_pixels, name) for name in KINDS}
    return Problem({LATENT: of_latents, **works}, LATENT, **facts(plain, latents))
