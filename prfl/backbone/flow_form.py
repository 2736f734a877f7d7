"""Networks that predict the noise or v on a variance-preserving path, as flow velocities.

Their latents are ``x = a x0 + b noise`` with a^2 + b^2 = 1.  Divided by a + b these are ``y = (1 - s) x0 + s noise``
with s = b / (a + b): latents of the one convention (base.py).  The velocity is noise - x0 in both.  On y, DDIM is
exactly Euler, and UniPC stays UniPC.

A network knows the path at its integer timesteps.  Between them it is asked at the timestep whose s, by a straight
line between the neighbours, is the one that is wanted.  Inverting the table takes float64: near s = 1 the neighbours
are 1e-4 apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone.base import Facts

Predicts = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class VariancePreserving:
    """A path by its table.  alphas_cumprod: a^2 at each integer timestep, falling (a diffusers scheduler's own)."""

    alphas_cumprod: Float[Tensor, " timesteps"]

    @cached_property  # it is read at every network call
    def sigmas(self) -> Float[Tensor, " timesteps"]:
        """s = b / (a + b) at each integer timestep, float64, rising."""
        return place(self.alphas_cumprod)

    @property
    def shift(self) -> float:
        """The shift of a flow's sigmas that has half of them above the same sigma as the table."""
        middle = float(self.sigmas.median())
        return middle / (1 - middle)

    def timestep(self, sigma: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Where a sigma lies in the table, float64: whole numbers at its entries, its ends outside of it."""
        table, sigma = self.sigmas.to(sigma.device), sigma.double()
        above = torch.searchsorted(table, sigma.contiguous()).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        return (above - 1 + (sigma - low) / (high - low)).clamp(0, len(table) - 1)

    def velocity(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        latents: Float[Tensor, b * state],
        sigma: Float[Tensor, "*b"],
        predicts: Predicts,
    ) -> Float[Tensor, b * state]:
        """noise - x0 at latents on the flow.  network: (x, timestep (b,)) to its prediction.  sigma: (b,) or ().

        A sigma beyond the table's last is taken for the last: at 1, predicted noise says nothing of x0.
        """
        each = sigma.double().expand(len(latents)).clamp(max=float(self.sigmas[-1]))
        to_path = 1 / scale(each)
        a, b, to_path = (spread(value, latents) for value in ((1 - each) * to_path, each * to_path, to_path))
        x = latents * to_path
        predicted = network(x, self.timestep(each).to(latents.device))
        if predicts == "epsilon":
            return predicted - (x - b * predicted) / a
        return (b - a) * x + (a + b) * predicted


def place(alphas_cumprod: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """s = b / (a + b) of a^2, float64."""
    a, b = alphas_cumprod.double().sqrt(), (1 - alphas_cumprod.double()).sqrt()
    return b / (a + b)


def start_size(facts: Facts, sigma: float) -> float:
    """The standard deviation of a chain's first latents: a pipeline's, x = noise, are noise / (a + b) on the flow."""
    return float(scale(torch.tensor(sigma, dtype=torch.float64))) if facts.variance_preserving else 1.0


def ended(facts: Facts, latents: Float[Tensor, b * state], sigma: float | Tensor) -> Float[Tensor, b * state]:
    """What a pipeline decodes of latents at sigma, where its chain ends: its own x = (a + b) y, on a path.

    The chain of a flow ends at data, and so do most: at sigma 0 these are the same latents.
    """
    if not facts.variance_preserving:
        return latents
    each = torch.as_tensor(sigma, dtype=torch.float64, device=latents.device).expand(len(latents))
    return latents / spread(scale(each), latents)


def scale(sigma: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """1 / (a + b) on the path: sqrt(s^2 + (1 - s)^2)."""
    return (sigma.square() + (1 - sigma).square()).sqrt()


def spread(values: Float[Tensor, " b"], like: Float[Tensor, b * state]) -> Tensor:
    """One value a sample, in the shape, dtype and place of latents."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))
