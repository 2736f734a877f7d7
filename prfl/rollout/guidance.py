"""Classifier-free guidance in training, explicitly: v = v_u + scale (v_c - v_u), and where its gradient goes."""

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
    """How strong guidance is while training, and where its gradient goes: see ``guided_network``.

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
    """Close ``velocity(latents, sigma, condition)`` over its condition and guidance; c = condition, u = empty.

    none: v = v_c, one call; scale must be 1.
    cond: v = sg(v_u) + scale (v_c - sg(v_u)): gradient through the conditional branch only; u runs without autograd.
    both: v = v_u + scale (v_c - v_u): gradient through both, both graphs alive at once.
    At scale 1 every mode is v_c and makes one call.  ``empty_condition`` has the batch size of ``condition``.
    scale: a number, or what it is at (latents, sigma): a number, or one of each frame.
    Raises PrflError for "none" with another scale, and where guidance lacks its empty condition.
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
