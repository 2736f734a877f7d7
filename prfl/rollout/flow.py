"""The convention of noise levels and velocities, stated once.

sigma = 1 is noise, sigma = 0 is data; ``x = (1 - sigma) x0 + sigma noise``; the network predicts the velocity
``v = noise - x0``, so that ``x0 = x - sigma v`` and an Euler step is ``x + (sigma_next - sigma) v``.
Sigmas of a chain are ``shift(linspace(1, 0, N + 1))`` with ``shift(u) = s u / (1 + (s - 1) u)``.
"""

from __future__ import annotations

from torch import Tensor

from prfl.utils.schedule import chain_sigmas as chain_sigmas
from prfl.utils.schedule import shift_sigmas as shift_sigmas


def expand_sigma(sigma: Tensor, like: Tensor) -> Tensor:
    """Return sigma, (batch,) or (), shaped to broadcast against latents (batch, ...), in their dtype and device."""
    sigma = sigma.to(like)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim)) if sigma.ndim else sigma


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the latents at sigma, (1 - sigma) x0 + sigma noise.  sigma: (batch,) or ()."""
    sigma = expand_sigma(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity that the network is trained to predict, noise - x0."""
    return noise - clean


def clean_prediction(latents: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Return the clean latents to which a velocity points, x - sigma v.  sigma: (batch,) or ()."""
    return latents - expand_sigma(sigma, latents) * velocity
