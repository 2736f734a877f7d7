"""What the objective tests share: a policy with an adapter that matters, rewards, and plain loops to compare with."""

from __future__ import annotations

import torch

from prfl.backbone import Backbone, Condition, LoraSpec
from prfl.data.dataset import LatentDataset
from prfl.objective.loss import RewardLoss
from prfl.objective.reward_gradient import RewardGradient
from prfl.reward import LatentReward, RewardAdapter, RewardHead
from prfl.reward.pixel import PixelNetwork, PixelReward
from prfl.reward.scorer import LatentScorer, PixelScorer
from tests.tiny import TEXT_WIDTH

PROMPTS = ["a red circle moves left", "a blue square", "a green triangle moves up quickly"]
SHAPE = (4, 3, 4, 4)  # 9 frames of 16 x 16


def with_policy(backbone: Backbone) -> Backbone:
    backbone.add_adapter("policy", LoraSpec(rank=2, alpha=2.0, targets=["to_q", "to_v", "ffn.net.2"]))
    stir(backbone, "policy", seed=3)
    return backbone


def stir(backbone: Backbone, name: str, seed: int) -> None:
    """Give an adapter weights that matter (it is made as the identity)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters(name).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def latent_reward(backbone: Backbone, own_adapter: bool) -> LatentReward:
    torch.manual_seed(0)
    head = RewardHead(backbone.facts.widths[0], ["motion", "look"], blocks=1, inner=16, heads=2, hidden=16)
    adapter = RewardAdapter(rank=2, alpha=4.0, targets=("to_q", "to_v", "ffn.net.2")) if own_adapter else None
    reward = LatentReward(head, backbone, [1], adapter=adapter)
    if own_adapter:
        stir(backbone, "reward", seed=4)
    return reward.freeze()


def pixel_reward() -> PixelReward:
    torch.manual_seed(1)
    return PixelReward(PixelNetwork(TEXT_WIDTH, ["motion", "look"], size=16, hidden=8, inner=16)).freeze()


LOSS = RewardLoss({"motion": 1.0, "look": -0.5}, shape="linear", scale=3.0)


def clips(shape: tuple[int, ...], conditions: dict[str, Condition]) -> LatentDataset:
    """Three clips, for methods that start from data; their prompts are in another order than the run's."""
    latents = torch.randn(3, *shape, generator=torch.Generator().manual_seed(9))
    device = torch.device("cpu")
    return LatentDataset(
        latents=latents, conditions=conditions, prompts=PROMPTS[::-1], device=device, skipped=[],
        video=torch.arange(3), labels={},
    )  # fmt: skip


def latent_objective(backbone, method, *, own_adapter=True, loss=LOSS, **more) -> RewardGradient:
    scorer = LatentScorer(latent_reward(backbone, own_adapter))
    return RewardGradient(backbone, method, scorer, loss, PROMPTS, SHAPE, **more)


def pixel_objective(backbone, method, *, frames="all", loss=LOSS, **more) -> RewardGradient:
    scorer = PixelScorer(pixel_reward(), backbone, seed=0, frames=frames)
    return RewardGradient(backbone, method, scorer, loss, PROMPTS, SHAPE, **more)


def take_gradients(objective) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in objective.parameters().items()}
    for parameter in objective.parameters().values():
        parameter.grad = None
    return grads


def assert_same_gradients(one, other, rtol=2e-4):
    """The blocks compute in float32, so to the rounding of a different order, relative to the whole gradient."""
    assert one.keys() == other.keys()
    size = max(float(g.abs().max()) for g in other.values())
    assert size > 1e-6
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=rtol * size, msg=lambda m, n=name: f"{n}: {m}")


def joint_graph_chain(objective, step, indices, first_trained, last):
    """A plain loop: x[last] with the graph of the steps from ``first_trained`` on, and its condition."""
    backbone, sigmas = objective.backbone, objective.method.schedule.sigmas.float()
    _, condition, x = objective.draw(step, indices)
    for i in range(last):
        with torch.set_grad_enabled(i >= first_trained), backbone.adapter("policy"):
            x = x + (sigmas[i + 1] - sigmas[i]) * backbone.velocity(x, sigmas[i], condition)
    return x, condition
