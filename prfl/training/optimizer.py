"""AdamW, its learning rate as a function of the step, clipping, and the sum of gradients over processes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn


def adamw(
    parameters: Sequence[nn.Parameter], *, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """Make AdamW over one group; the loop sets the learning rate before every step."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=weight_decay)


def learning_rate(step: int, *, peak: float, warmup: int = 0, schedule: str = "constant", steps: int = 1) -> float:
    """Return the rate of optimizer step ``step`` (from 0): linear warmup, then what the schedule says.

    constant, or down to 0 at ``steps`` along a line or half a cosine.  It is a function of the step alone, so a resumed
    run has nothing to restore.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return peak * factors[schedule]


def gradients(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def average_gradients(parameters: Sequence[nn.Parameter], share: float, accelerator: Accelerator) -> None:
    """Turn sums of per-call means into the mean over the global batch.

    share: this process's samples per call over the samples of the whole step; so an uneven split stays exact.
    Every parameter takes part on every process, with zeros where it got no gradient, so that the sums line up.
    """
    if accelerator.num_processes == 1:
        for gradient in gradients(parameters):
            gradient.mul_(share)
        return
    for parameter in parameters:
        local = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = accelerator.reduce(local * share, reduction="sum")


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> float:
    """Scale the gradient down to ``max_norm`` (None: never); returns its norm before that."""
    norm = torch.nn.utils.get_total_norm(gradients(parameters))
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def apply(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Take the optimizer's step at this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
