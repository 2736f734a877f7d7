"""The loss that a reward-gradient objective minimises, and its gradient at the latents: the seeds of the adjoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone.condition import Condition
from prfl.reward.scorer import Scorer
from prfl.reward.scores import Scores, Shape, total
from prfl.rollout.plan import Node, StepPlan
from prfl.utils.errors import PrflError


@dataclass(frozen=True)
class RewardLoss:
    """The loss of one sample, to be minimised: scale * -r (``linear``), or scale * relu(target - r) (``hinge``).

    r is the weighted aggregate of the scores (``scores.total``).  The PRFL paper has a hinge with target 2, scale 0.1.
    """

    weights: dict[str, float]
    aggregate: Shape = "sum"
    shape: Literal["linear", "hinge"] = "hinge"
    target: float = 2.0
    scale: float = 0.1

    def __call__(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return (loss (b,), r (b,))."""
        reward = total(scores, self.weights, self.aggregate)
        missing = self.target - reward
        return self.scale * (missing.relu() if self.shape == "hinge" else -reward), reward


def loss_gradient(
    scorer: Scorer,
    loss: RewardLoss,
    latents: Float[Tensor, "b c t h w"],
    sigma: Float[Tensor, ""],
    condition: Condition,
    step: int,
    *,
    at_once: int | None = None,
) -> tuple[Float[Tensor, "b c t h w"], dict[str, float]]:
    """Return d mean(loss) / d latents, and metrics.  The reward's graph is freed before it returns.

    at_once: how many samples are scored in one graph; None is all.  The gradient does not depend on it, because the
    mean is a sum over samples.
    Raises PrflError when no gradient gets from the reward to the latents.  A gradient that is not finite is returned
    as it is: the trainer stops before the optimizer's step and saves the batch.
    """
    count = len(latents)
    gradients, losses, rewards, scored = [], [], [], []
    for first in range(0, count, at_once or count):
        rows = slice(first, first + (at_once or count))
        leaf = latents[rows].detach().requires_grad_()
        with scorer.selected(), torch.enable_grad():
            scores = scorer(leaf, sigma.expand(len(leaf)), condition[rows], step)
            per_sample, reward = loss(scores)
            part = per_sample.sum() / count
            gradients.append(torch.autograd.grad(part, leaf, allow_unused=True)[0] if part.requires_grad else None)
        losses.append(part.detach())
        rewards.append(reward.detach())
        scored.append({name: values.detach() for name, values in scores.items()})

    # Where every reward is above the hinge a zero gradient is right; otherwise it is a fault.
    reward = torch.cat(rewards)
    arrived = [gradient for gradient in gradients if gradient is not None]
    unmet = loss.shape == "linear" or bool((reward < loss.target).any())
    if len(arrived) < len(gradients) or (unmet and not any(bool(gradient.count_nonzero()) for gradient in arrived)):
        raise PrflError(
            "the reward gives no gradient to the latents",
            where="reward",
            fix="use a reward that is differentiable in its input, and check that it does not run under no_grad",
        )

    metrics = {"loss": float(torch.stack(losses).sum()), "reward": float(reward.mean())}
    metrics |= {f"reward/{name}": float(torch.cat([part[name] for part in scored]).mean()) for name in scored[0]}
    return torch.cat(arrived), metrics | {"reward_std": float(reward.std(correction=0))}


def seed_gradients(
    read: Callable[[Float[Tensor, "b c t h w"], Float[Tensor, ""]], tuple[Tensor, dict[str, float]]],
    scored: Mapping[Node, Float[Tensor, "b c t h w"]],
    step_plan: StepPlan,
    weights: Float[Tensor, " b"] | None,
) -> tuple[dict[Node, Float[Tensor, "b c t h w"]], dict[str, float]]:
    """Return the seeds of a plan, computed one node at a time, and the metrics averaged over the nodes.

    read: ``loss_gradient`` at (latents, sigma).  scored: the latents of each node.
    weights: (b,), the weight of each sample's loss; None weighs all samples alike.
    """
    seeds, metrics = dict[Node, Tensor](), dict[str, float]()
    total_share = sum(step_plan.seeds.values())
    for node, share in step_plan.seeds.items():
        x = scored[node]
        dtype = torch.promote_types(x.dtype, torch.float32)
        gradient, values = read(x, torch.tensor(step_plan.sigma(node), device=x.device, dtype=dtype))

        seeds[node] = share * gradient
        if weights is not None:
            seeds[node] *= weights.to(gradient).reshape(-1, *[1] * (gradient.ndim - 1))
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0.0) + share / total_share * value
    return seeds, metrics if weights is None else metrics | {"similarity": float(weights.mean())}
