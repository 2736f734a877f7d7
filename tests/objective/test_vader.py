"""VADER's two-phase step, decoder included, against a plain joint-graph loop on real Wan blocks and the real VAE."""

from __future__ import annotations

import pytest
import torch

from prfl.objective.methods.vader import Vader
from prfl.reward.frames import decode_frames, draw_frames
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.solvers import euler
from tests.models import with_own_vae
from tests.objective.parts import (
    assert_same_gradients,
    joint_graph_chain,
    latent_objective,
    pixel_objective,
    take_gradients,
    with_policy,
)
from tests.slow import slow_unless

CHAIN = euler(chain_sigmas(4, 3.0))
INDICES = [0, 1]


@pytest.mark.parametrize("last_steps", slow_unless((3).__eq__, [1, 3]))
@pytest.mark.parametrize("checkpointing", slow_unless("none".__ne__, ["none", "full", "attention"]))
def test_equals_the_joint_graph_through_the_decoder(tiny_backbone, last_steps, checkpointing):
    objective = pixel_objective(with_policy(tiny_backbone), Vader(CHAIN, 0, last_steps))
    x, condition = joint_graph_chain(objective, 0, INDICES, CHAIN.steps - last_steps, CHAIN.steps)
    scores = objective.scorer.reward(tiny_backbone.decode(x), condition)
    objective.loss(scores)[0].mean().backward()
    expected = take_gradients(objective)
    tiny_backbone.running.checkpointing, tiny_backbone.running.offload = checkpointing, checkpointing == "attention"
    objective.reward_batch = 1 if checkpointing == "full" else None
    metrics = objective.accumulate(0, INDICES)
    assert metrics["sigma"] == 0.0
    assert_same_gradients(take_gradients(objective), expected)


@pytest.mark.parametrize("frames", ["one", 2])
def test_frame_subsampling_equals_the_joint_graph(tiny_backbone, frames):
    objective = pixel_objective(with_policy(tiny_backbone), Vader(CHAIN, 0), frames=frames)
    x, condition = joint_graph_chain(objective, 0, INDICES, CHAIN.steps - 1, CHAIN.steps)
    chosen = draw_frames(3, frames, seed=0, step=0)
    mixed = torch.stack([x[:, :, t] if t in chosen else x[:, :, t].detach() for t in range(3)], dim=2)
    shown = [f for t in chosen for f in {0: [0], 1: [1, 2, 3, 4], 2: [5, 6, 7, 8]}[t]]
    scores = objective.scorer.reward(tiny_backbone.decode(mixed)[:, :, shown], condition, torch.tensor(shown) / 8)
    objective.loss(scores)[0].mean().backward()
    expected = take_gradients(objective)
    objective.accumulate(0, INDICES)
    assert_same_gradients(take_gradients(objective), expected)


def test_a_latent_reward_at_the_last_step(tiny_backbone):
    objective = latent_objective(with_policy(tiny_backbone), Vader(CHAIN, 0, last_steps=2))
    x, condition = joint_graph_chain(objective, 0, INDICES, CHAIN.steps - 2, CHAIN.steps)
    objective.loss(objective.scorer.reward(x, torch.zeros(2), condition))[0].mean().backward()
    expected = take_gradients(objective)
    objective.accumulate(0, INDICES)
    assert_same_gradients(take_gradients(objective), expected)


def test_frames_are_drawn_anew_each_step():
    assert draw_frames(5, "all", 0, 0) == [0, 1, 2, 3, 4] == draw_frames(5, 9, 0, 0)
    assert {tuple(draw_frames(3, "one", 0, step)) for step in range(40)} == {(0,), (1,), (2,)}
    assert all(a < b for a, b in (draw_frames(5, 2, 0, step) for step in range(20)))


def test_decoded_frames_are_those_of_the_whole_clip(tiny_backbone):
    """The decoder is causal: what is decoded of a clip does not depend on the latent frames that come after."""
    latents = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole = tiny_backbone.decode(latents)
    pixels, times = decode_frames(tiny_backbone, latents, [1])
    torch.testing.assert_close(pixels, whole[:, :, 1:5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(times, torch.tensor([1.0, 2.0, 3.0, 4.0]) / 8)
    pixels.sum().backward()
    reached = latents.grad.abs().amax((0, 1, 3, 4)) > 0
    assert reached.tolist() == [False, True, False]


def test_pixels_beyond_the_clamp_still_have_a_gradient(tiny_backbone):
    torch.nn.init.constant_(with_own_vae(tiny_backbone).vae.decoder.conv_out.bias, 5.0)  # every pixel saturated
    latents = torch.zeros(1, 4, 1, 4, 4).requires_grad_()
    pixels, _ = decode_frames(tiny_backbone, latents, [0])
    assert float(pixels.min()) > 1
    pixels.sum().backward()
    assert float(latents.grad.abs().max()) > 0
