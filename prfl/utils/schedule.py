"""The sigmas of a chain: ``shift(linspace(1, 0, N + 1))`` with ``shift(u) = s u / (1 + (s - 1) u)``."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_sigmas(u: Tensor, shift: float) -> Tensor:
    """Move uniform times u in [0, 1] towards noise (shift > 1): s u / (1 + (s - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def unshifted(sigma: float, shift: float) -> float:
    """Invert ``shift_sigmas``: return the uniform time that it moves to this sigma."""
    return sigma / (1 + (shift - 1) * (1 - sigma))


def chain_sigmas(steps: int, shift: float) -> Tensor:
    """Return the N + 1 sigmas of an N-step chain, float64, from 1 (noise) to 0 (clean)."""
    if steps < 1:
        raise ValueError(f"a chain needs at least one step, got {steps}")
    return shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def node_at(share: float, steps: int) -> int:
    """Return the number of the latent that a chain reaches after this share of its steps: at least 1."""
    return max(1, round(share * steps))
