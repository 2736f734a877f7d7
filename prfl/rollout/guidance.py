"""Classifier-free guidance in training, v = v_u + scale (v_c - v_u), and through which branch its gradient flows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prfl.rollout.trajectory import Network
from prfl.utils.errors import PrflError


@dataclass(frozen=True)
class Guidance:
    """How strong guidance is in training, and through which branch its gradient flows: see ``guided_network``.

    scale: a ``guidance_scale.Scale``.
    """

    scale: Any = 1.0
    gradient: Literal["none", "cond", "both"] = "none"


def guided_network(
    velocity: Callable[[Tensor, Tensor, Any], Tensor],
    condition: Any,
    empty_condition: Any = None,
    *,
    scale: float | Callable[[Tensor, Tensor], float | Tensor] = 1.0,
    gradient: Literal["none", "cond", "both"] = "none",
) -> Network:
    """Return ``velocity`` as a function of latents and sigma, with its condition and guidance fixed.

    v_c is the velocity under ``condition``, v_u that under ``empty_condition``, which has the same batch size.
    gradient:
    "none": v = v_c, one call; the scale must be 1.
    "cond": v = sg(v_u) + scale (v_c - sg(v_u)); gradient through v_c only, and v_u is computed without autograd.
    "both": v = v_u + scale (v_c - v_u); gradient through both, and both graphs are in memory at once.
    At scale 1 each of them is v_c, with one call.
    scale: a number, or a function of (latents, sigma) that returns a number, or a tensor with one number per frame.
    Raises PrflError for "none" with another scale than 1, and for guidance without an empty condition.
    """
    if gradient == "none" and scale != 1:
        raise PrflError(
            f"guidance scale {scale} with guidance gradient 'none'",
            fix="set the scale to 1, or choose 'cond' or 'both' for the gradient",
        )
    if scale != 1 and empty_condition is None:
        raise PrflError(f"guidance scale {scale} without an empty condition", fix="give the condition of the prompt ''")

    def network(latents: Tensor, sigma: Tensor) -> Tensor:
        factor = scale(latents, sigma) if callable(scale) else scale
        if isinstance(factor, float | int) and factor == 1:
            return velocity(latents, sigma, condition)
        with torch.set_grad_enabled(torch.is_grad_enabled() and gradient == "both"):
            unconditional = velocity(latents, sigma, empty_condition)
        return unconditional + factor * (velocity(latents, sigma, condition) - unconditional)

    return network
