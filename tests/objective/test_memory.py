"""What a whole training step keeps for its backward passes: flat in the number of gradient steps, so much a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prfl.backbone import Backbone, LoraSpec, load_architecture
from prfl.backbone.wan.text import text_condition
from prfl.estimate.live_tensors import LiveBytes, SavedBytes, fused_on_meta
from prfl.objective.loss import RewardLoss, loss_gradient
from prfl.objective.methods.vader import Vader
from prfl.objective.reward_gradient import RewardGradient
from prfl.reward.pixel import PixelNetwork, PixelReward
from prfl.reward.scorer import LatentScorer, PixelScorer
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.solvers import euler
from prfl.utils.host_store import HostStore
from tests.models import with_own_vae
from tests.objective.parts import (
    LOSS,
    PROMPTS,
    joint_graph_chain,
    latent_objective,
    latent_reward,
    pixel_objective,
    with_policy,
)
from tests.slow import slow_unless
from tests.tiny import TEXT_WIDTH
from tests.tolerance import assert_near

SHAPE = (4, 5, 8, 8)  # 80 tokens
LATENTS = 2 * 4 * 5 * 8 * 8 * 4  # bytes, of two samples
CHAIN = euler(chain_sigmas(6, 3.0))
INDICES = [0, 1]
SUMS = {"terms": 27 * 32, "depth": 20}  # of the tiny decoder: 3 x 3 x 3 places of 32 channels, 20 layers
MODES = [("none", False), ("attention", False), ("attention", True), ("full", False), ("full", True)]


def make_objective(backbone: Backbone, last_steps: int, **more: Any) -> RewardGradient:
    scorer = LatentScorer(latent_reward(backbone, own_adapter=False))
    method = Vader(CHAIN, 0, last_steps)
    objective = RewardGradient(backbone, method, scorer, LOSS, PROMPTS, SHAPE, distance_every=0, **more)
    for parameter in objective.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    return objective


def training_step(objective: RewardGradient) -> tuple[int, int]:
    """Peaks of a step: what autograd keeps, and what is alive at all."""
    with SavedBytes() as saved, LiveBytes() as counted:
        objective.accumulate(0, INDICES)
    assert saved.live == counted.live == 0, "something of the step's graph outlives it"
    return saved.peak, counted.peak


@pytest.mark.parametrize("mode, offload", slow_unless([("none", False), ("full", True)].__contains__, MODES))
def test_a_step_is_flat_in_the_number_of_gradient_steps(tiny_backbone: Backbone, mode: Any, offload: bool) -> None:
    backbone = with_policy(tiny_backbone)
    backbone.running.checkpointing, backbone.running.offload = mode, offload
    saved, alive = {}, {}
    for last_steps in (1, 2, 5):
        saved[last_steps], alive[last_steps] = training_step(make_objective(backbone, last_steps))
    # From two steps on the cotangent goes on to the latents; a step more is its latents more, and between two steps
    # with gradient two more cotangents are alive.
    assert saved[5] == saved[2] <= 1.1 * saved[1]
    held = mode != "none"  # of one edge: the reward lives beside it
    assert alive[5] <= alive[2] + (3 + 2) * LATENTS + 64
    assert held or alive[2] <= 1.1 * alive[1]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_distance_takes_one_of_the_offloaded_latents_at_a_time(
    tiny_backbone: Backbone, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = with_policy(tiny_backbone)
    backbone.running.checkpointing, backbone.running.offload = "full", True
    peaks, taken = {}, []
    take = HostStore.take
    monkeypatch.setattr(HostStore, "take", lambda self, parked: taken.append(parked) or take(self, parked))
    for last_steps in (2, 6):
        objective = make_objective(backbone, last_steps, distance_weight=weight)
        objective.distance_every = 1
        step_plan = objective.plan(0)
        _, condition, start = objective.draw(0, INDICES)
        with backbone.adapter("policy"):
            trajectory = objective.trajectory(objective.network(condition), start, 0, INDICES)
        backbone.running.offload = False  # its blocks' checkpoints would be in the store of their own
        taken.clear()
        with LiveBytes() as counted:
            objective.distance(0, trajectory, step_plan, condition)
        backbone.running.offload, peaks[last_steps] = True, counted.peak
        assert len(taken) == last_steps
    assert peaks[6] < peaks[2] + LATENTS


def test_the_joint_graph_is_not_flat(tiny_backbone: Backbone) -> None:
    """What the test above would see if a graph were hidden somewhere."""
    backbone = with_policy(tiny_backbone)
    peaks = {}
    for last_steps in (1, 2, 5):
        objective = make_objective(backbone, last_steps)
        with SavedBytes() as saved:
            joint_graph_chain(objective, 0, INDICES, CHAIN.steps - last_steps, CHAIN.steps)[0].sum()
        peaks[last_steps] = saved.peak
    assert peaks[2] > 1.9 * peaks[1] and peaks[5] > 4.5 * peaks[1]


# ------------------------------------------------------------------------------------------------------- per block

# In u: the bytes of one bfloat16 hidden state.  none: that of a LoRA on all six kinds of layers, on a CPU and on a GPU
# (whose RMS norm is fused).  attention: its input, its output and four bytes a head (log-sum-exp).
BUDGETS = {
    ("none", False, "cpu"): 33.0, ("none", False, "cuda"): 30.0, ("attention", False, "cuda"): 2.02,
    ("attention", True, "cuda"): 0.02, ("full", False, "cuda"): 1.0, ("full", True, "cuda"): 0.0,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode, offload, device", BUDGETS)
def test_a_block_of_wan_1_3b_keeps_within_its_budget(mode: Any, offload: bool, device: str) -> None:
    """At 480 x 832 and 81 frames, on ``meta``: what the third block adds to two."""
    tokens, shape = 32760, (1, 16, 21, 60, 104)
    unit = tokens * 1536 * 2

    def kept(blocks: int) -> int:
        with torch.device("meta"):
            model = load_architecture("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch.bfloat16)
            model.transformer.blocks = model.transformer.blocks[:blocks]
            targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
            model.add_adapter("policy", LoraSpec(rank=32, alpha=32, targets=targets))
            condition = text_condition(
                torch.empty(1, 80, model.facts.text_width, dtype=torch.bfloat16), torch.tensor([80])
            )
            latents = torch.empty(shape)
        model.running.checkpointing, model.running.offload = mode, offload
        with fused_on_meta(device), LiveBytes() as counted, model.adapter("policy"):
            output = model.velocity(latents, torch.tensor(0.5), condition)
            assert output.requires_grad
            return counted.live

    added = (kept(3) - kept(2)) / unit
    budget = BUDGETS[mode, offload, device]
    assert budget - 0.1 <= added <= budget + 1e-3


# ------------------------------------------------------------------------------------------------------- the reward


@pytest.mark.parametrize("at_once", slow_unless([2, 3].__contains__, [1, 2, 3, 7]))
@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_scoring_in_parts_gives_the_same_seeds(tiny_backbone: Backbone, at_once: int, space: str) -> None:
    """And metrics; a part may be beyond the hinge as a whole."""
    make = latent_objective if space == "latent" else pixel_objective
    objective = make(with_policy(tiny_backbone), Vader(CHAIN, 0))
    latents = torch.randn(5, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    condition = tiny_backbone.condition([PROMPTS[i % 3] for i in range(5)])
    sigma = torch.tensor(0.0)

    def seeds(loss: RewardLoss, at_once: int | None) -> tuple[Tensor, dict[str, float]]:
        return loss_gradient(objective.scorer, loss, latents, sigma, condition, 0, at_once=at_once)

    _, scored = seeds(LOSS, None)
    for loss in (LOSS, RewardLoss(LOSS.weights, shape="hinge", target=scored["reward"])):
        expected, metrics = seeds(loss, None)
        found, in_parts = seeds(loss, at_once)
        assert_near(found, expected, **SUMS)
        assert in_parts == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        pulled = int(expected.flatten(1).abs().amax(1).gt(0).sum())
        assert pulled == 5 if loss is LOSS else 0 < pulled < 5


def test_scoring_in_parts_takes_less(tiny_backbone: Backbone) -> None:
    objective = latent_objective(with_policy(tiny_backbone), Vader(CHAIN, 0))
    peaks = {}
    for at_once in (1, None):
        objective.reward_batch, taken = at_once, []

        def counted(*inputs: Any, taken: list[int] = taken, **more: Any) -> Any:
            with LiveBytes() as live:
                result = loss_gradient(*inputs, **more)
            taken.append(live.peak)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("prfl.objective.reward_gradient.loss_gradient", counted)
            objective.accumulate(0, range(4))
        peaks[at_once] = taken[0]
    assert peaks[1] < 0.3 * peaks[None]


@pytest.mark.parametrize("decoder", slow_unless("full".__eq__, ["none", "full"]))
def test_frames_scored_by_themselves_are_differentiated_one_at_a_time(
    tiny_backbone: Backbone, decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of all frames' graphs together, and in float64 to its precision; it takes less."""
    torch.manual_seed(1)
    network = PixelNetwork(TEXT_WIDTH, ["motion", "look"], size=64, hidden=32, inner=32).double()
    with_own_vae(tiny_backbone).vae.double()
    tiny_backbone.running.checkpointing = decoder
    scorer = PixelScorer(PixelReward(network).freeze(), tiny_backbone, 0, temporal_decay=0.5)
    latents = torch.randn(2, 4, 5, 4, 4, dtype=torch.float64)
    condition = tiny_backbone.condition(PROMPTS[:2])

    def found() -> tuple[Tensor, dict[str, float], int]:
        with LiveBytes() as counted:
            gradient, metrics = loss_gradient(scorer, LOSS, latents, torch.tensor(0.0), condition, 0)
        return gradient, metrics, counted.peak

    gradient, metrics, peak = found()
    monkeypatch.setattr("prfl.reward.scorer.checkpoint", lambda read, *inputs, **_: read(*inputs))
    together, expected, all_of_them = found()
    torch.testing.assert_close(gradient, together, rtol=1e-12, atol=1e-14)
    assert metrics == pytest.approx(expected, rel=1e-12)
    assert peak < 0.7 * all_of_them
