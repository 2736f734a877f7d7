"""Which pixel frames a latent frame is: the first is one, every later one as many as the VAE's temporal factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pixel_counts(shown: Sequence[int], factor: int) -> list[int]:
    """How many pixel frames each of these latent frames is."""
    return [1 if latent == 0 else factor for latent in shown]


def pixel_frames(shown: Sequence[int], factor: int) -> list[int]:
    """The pixel frames of these latent frames, by their index in the whole video."""
    frames: list[int] = []
    for latent in shown:
        frames += [0] if latent == 0 else range((latent - 1) * factor + 1, latent * factor + 1)
    return frames


def pixel_times(shown: Sequence[int], count: int, factor: int) -> Tensor:
    """When the pixel frames of these latent frames are, in [0, 1] of the whole video of ``count`` latent frames."""
    last = max(1, (count - 1) * factor)
    return torch.tensor(pixel_frames(shown, factor), dtype=torch.float32) / last


def detach_others(latents: Tensor, shown: Sequence[int]) -> Tensor:
    """Latents (b, c, t, h, w) of which only the frames that are shown pass gradient on."""
    passes = torch.zeros(latents.shape[2], 1, 1, dtype=torch.bool, device=latents.device)
    passes[list(shown)] = True
    return torch.where(passes, latents, latents.detach())
