"""AdamW, its learning rate as a function of the step, clipping, and the sum of gradients over processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from accelerate import Accelerator
from torch import nn


def adamw(
    parameters: Sequence[nn.Parameter],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    sizes: Sequence[int] = (),
) -> torch.optim.AdamW:
    """Make AdamW; the loop sets the learning rate before every step.

    sizes: how many of the parameters, in their order, make each group that has a rate of its own; default is one group.
    """
    ends = list(accumulate(sizes or [len(parameters)]))
    groups = [{"params": parameters[first:end]} for first, end in zip([0, *ends], ends, strict=False)]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, weight_decay=weight_decay)


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
    What got a gradient on any process takes part on every one, with zeros where it got none, so that the sums line up;
    the rest stays without one, and the optimizer leaves it alone, as on one process.
    """
    if accelerator.num_processes == 1:
        for gradient in gradients(parameters):
            gradient.mul_(share)
        return
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=accelerator.device)
    anywhere = accelerator.reduce(there, reduction="sum").tolist()
    for parameter in [p for p, count in zip(parameters, anywhere, strict=True) if count]:
        local = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = accelerator.reduce(local * share, reduction="sum")


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> float:
    """Scale the gradient down to ``max_norm`` (None: never); returns its norm before that."""
    norm = torch.nn.utils.get_total_norm(gradients(parameters))
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def apply(optimizer: torch.optim.Optimizer, rate: float | Sequence[float]) -> None:
    """Take the optimizer's step at this learning rate, or at one of each group."""
    groups = optimizer.param_groups
    rates = [rate] * len(groups) if isinstance(rate, float | int) else rate
    for group, of_group in zip(groups, rates, strict=True):
        group["lr"] = of_group
    optimizer.step()
