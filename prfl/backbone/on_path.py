"""What families share whose network predicts the noise or v on a variance-preserving path: flow_form.py applied."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone.base import Facts
from prfl.backbone.condition import EMBEDS, Condition
from prfl.backbone.flow_form import VariancePreserving, place, start_size
from prfl.backbone.hooked import HookedBackbone
from prfl.backbone.pipeline_text import PipelineText
from prfl.backbone.source import Source
from prfl.utils.errors import PrflError
from prfl.utils.schedule import chain_sigmas


def load_scheduler(source: Source, kind: Any, needed: Mapping[str, object]) -> Any:
    """Deterministic DDIM, of this diffusers class, on the path of the model's scheduler, whichever that is.

    Raises PrflError where one of its settings is not what is needed.
    """
    config = source.config(kind, "scheduler")
    scheduler = kind.from_config({name: config[name] for name in config if name != "_class_name"})
    for name, value in needed.items():
        if scheduler.config[name] != value:
            raise PrflError(
                f"the scheduler's {name} is {scheduler.config[name]!r}",
                where=f"{source.name}/scheduler",
                fix=f"only {value!r} is supported",
            )
    return scheduler


class PathBackbone(HookedBackbone):
    """A family gives ``predict``; the chain is that of its scheduler, which says what the network predicts."""

    def __init__(
        self, networks: Mapping[str, nn.Module], vae: nn.Module, text: PipelineText, facts: Facts, scheduler: Any
    ) -> None:
        super().__init__(networks, vae, text, facts)
        self.scheduler, self.path = scheduler, VariancePreserving(scheduler.alphas_cumprod)

    @abstractmethod
    def predict(self, text: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """The network's output at latents of the path, (b, c, t, h, w).  timestep: (b,), not rounded."""

    def velocity(
        self, latents: Float[Tensor, "b c t h w"], sigma: Float[Tensor, "*sigma"], condition: Condition
    ) -> Float[Tensor, "b c t h w"]:
        """noise - x0, from the network at the timestep whose place on the path is sigma.  Dtype of ``latents``."""
        flow, text = latents.to(torch.promote_types(latents.dtype, torch.float32)), condition.tensors[EMBEDS]
        assert len(text) == len(flow), f"{len(flow)} latents but {len(text)} conditions"
        with self.precision(next(self.network.parameters())):
            predict = partial(self.predict, text.to(flow.device, self.facts.dtype))
            kind = self.scheduler.config.prediction_type
            return self.path.velocity(predict, flow, sigma.to(flow.device), kind).to(latents.dtype)

    def sigmas(self, steps: int, shape: Sequence[int], shift: float | None = None) -> Float[Tensor, " n"]:
        """Those of the pipeline's timesteps, on which DDIM is Euler, or with a shift a flow's.

        Raises PrflError for a shift where the path does not reach noise, and for more steps than the model has.
        """
        table = self.path.sigmas
        if shift is not None:
            if table[-1] < 1:
                what = f"this model's noise ends at sigma {float(table[-1]):.3f}, and a shifted chain begins at 1"
                raise PrflError(what, where="rollout.shift", fix="leave it out: the model has timesteps of its own")
            return chain_sigmas(steps, shift)
        if steps <= len(table):
            self.scheduler.set_timesteps(steps)
        if steps > len(table) or int(self.scheduler.timesteps[0]) >= len(table):
            what = f"{steps} steps, and the model has {len(table)} timesteps"
            raise PrflError(what, where="rollout.steps", fix="take fewer")
        end = place(torch.as_tensor(self.scheduler.final_alpha_cumprod))
        return torch.cat([table[self.scheduler.timesteps], end[None]])

    def start(
        self, noise: Float[Tensor, "b c t h w"], condition: Condition, sigma: float
    ) -> Float[Tensor, "b c t h w"]:
        return noise * start_size(self.facts, sigma)
