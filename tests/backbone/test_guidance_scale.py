"""Scales of guidance that are not one number: of each expert, or from the first frame to the last."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from prfl.backbone.guidance_scale import ScaleOfExperts, ScaleOfFrames, branches_at, read_scale, scale_at
from prfl.rollout.guidance import guided_network
from prfl.utils.text import of_experts

FRAMES = 5


@pytest.mark.parametrize("gradient", ["cond", "both"])
def test_each_frame_is_guided_by_its_scale(tiny_backbone, gradient: str) -> None:
    """The velocity, its gradient and the number of calls are those of the equation, written out frame by frame."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(2, 3, FRAMES, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    calls = []

    def velocity(latents: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        calls.append(1)
        return torch.tanh(weight * latents + condition) + sigma

    weight.requires_grad_()
    sigma, full, empty = (torch.tensor(value, dtype=torch.float64) for value in (0.7, 1.0, 0.0))
    scale = scale_at(tiny_backbone.facts, ScaleOfFrames(1.0, 3.0))
    ours = guided_network(velocity, full, empty, scale=scale, gradient=gradient)(x, sigma)
    assert len(calls) == 2
    with torch.set_grad_enabled(gradient == "both"):
        unguided = velocity(x, sigma, empty)
    guided = velocity(x, sigma, full)
    frames = [unguided[:, :, t] + s * (guided - unguided)[:, :, t] for t, s in enumerate((1.0, 1.5, 2.0, 2.5, 3.0))]
    expected = torch.stack(frames, dim=2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(each.sin().sum(), weight, retain_graph=True)[0] for each in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_a_scale_is_read_as_it_was_written() -> None:
    for scale, text in ((ScaleOfFrames(1.0, 3.0), "1 (first frame), 3 (last frame)"),
                        (ScaleOfExperts(4.0, 3.5), "4 (high), 3.5 (low)")):  # fmt: skip
        saved = json.loads(json.dumps(asdict(scale)))
        assert read_scale(saved) == scale and of_experts(saved) == text
    assert read_scale(3.0) == 3.0


def test_how_many_calls_a_scale_makes(tiny_backbone) -> None:
    scales = {1.0: 1, 3.0: 2, ScaleOfFrames(1.0, 3.0): 2}
    assert {scale: branches_at(tiny_backbone.facts, scale, 0.5) for scale in scales} == scales
