"""What a backbone of a test says of itself: a family of its own, with nothing of Wan."""

from __future__ import annotations

from typing import Any

import torch

from prfl.backbone import Ask, Condition, Facts
from prfl.backbone.condition import TensorSpec


def toy_facts(**changes: Any) -> Facts:
    """The facts of a float64 toy on the CPU.  changes: those that a test needs otherwise."""
    facts: dict[str, Any] = {
        "family": "toy",
        "model_id": "toy",
        "revision": None,
        "identity": {"model_id": "toy"},
        "settings": "",
        "schedule": (1.0,),
        "blocks": {},
        "widths": (6, 6, 6),
        "head_size": 6,
        "condition": {"text": TensorSpec((2,), torch.float64)},
        "text_tokens": 1,
        "text_width": 2,
        "text_identity": "toy",
        "latent_channels": 3,
        "patch": (1, 1, 1),
        "spatial_factor": 1,
        "temporal_factor": 1,
        "prefix_decodes": False,
        "shift": 1.0,
        "device": torch.device("cpu"),
        "dtype": torch.float64,
        "vae_dtype": torch.float64,
    }
    return Facts(**(facts | changes))


class NoText:
    """Text encoders of a toy that has none."""

    def __init__(self) -> None:
        self.known: dict[Ask, Condition] = {}

    def encoder(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def unknown(self) -> int | None:
        return None

    def tokens(self, prompts, *, cut=True):
        return [tuple(prompt.encode()) for prompt in prompts]

    def free(self) -> None:
        pass
