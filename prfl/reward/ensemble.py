"""Several latent rewards as one: their mean, less a multiple of how far they disagree.

A policy that is pushed beyond its reward's training data finds videos that a single head likes by mistake; other heads
do not share the mistake, so there they disagree.  After the uncertainty-weighted ensembles of Coste et al. 2023 (arXiv
2310.02743), who subtract the variance; the deviation subtracted here has the scores' own unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from prfl.backbone.condition import Condition
from prfl.reward.inputs import Prompts, Sigmas, prepare
from prfl.reward.latent import LatentReward
from prfl.reward.scores import Scores
from prfl.utils.errors import PrflError

UNCERTAINTY = "uncertainty"  # a score beside those of the dimensions: the members' deviation, mean over dimensions


class RewardEnsemble:
    """``ensemble(latents, sigma, condition)`` gives {dimension: (b,)} and ``uncertainty``, differentiable in latents.

        score = mean over members of s_k - uncertainty_weight * their deviation        for each dimension

    s_k: each member's normalised score, or (``logits``) its logit.  The deviation is that of these members
    (divided by their number), not an estimate for others.

    Members are frozen and share one backbone.  Those without an adapter share one forward pass too.  Each adapter needs
    its own, and only one adapter can be selected: with any adapter the passes run without a graph, and the backward
    pass repeats them one by one, each with the gradient that the combined score has in this member's scores.  That is
    the chain rule, so it is exact, and never are two passes' activations alive.

    Raises PrflError for members of other dimensions, or on other backbones.
    """

    space = "latent"
    noise_aware = True
    differentiable = True

    def __init__(self, members: Sequence[LatentReward], uncertainty_weight: float = 0.0) -> None:
        first = members[0]

        for number, member in enumerate(members[1:], start=2):
            if set(member.dimensions) != set(first.dimensions):
                raise PrflError(
                    f"the rewards score different dimensions: the first {', '.join(first.dimensions)}; "
                    f"number {number} {', '.join(member.dimensions)}",
                    where="reward.path",
                    fix="name rewards that were trained on the same labels",
                )
            assert member.backbone is first.backbone, "members read the same copy of the weights"
        if UNCERTAINTY in first.dimensions:
            fix = "train the rewards with another name for it"
            raise PrflError(f"a dimension cannot be called '{UNCERTAINTY}' here", where="reward.path", fix=fix)

        self.members = [member.freeze() for member in members]
        self.backbone = first.backbone
        self.uncertainty_weight = uncertainty_weight

        # One forward pass for all members without an adapter, and one for each that has its own.
        by_adapter: dict[str | None, list[LatentReward]] = {}
        for member in self.members:
            by_adapter.setdefault(member.adapter.name if member.adapter else None, []).append(member)
        shared = [name for name, group in by_adapter.items() if name and len(group) > 1]
        assert not shared, "each adapter has its own name"
        self.passes = list(by_adapter.values())

    @property
    def dimensions(self) -> tuple[str, ...]:
        return self.members[0].dimensions

    def selected(self) -> AbstractContextManager:
        """Select the first pass's adapter: around a backward pass it matters where there is only one pass."""
        return self.passes[0][0].selected()

    def __call__(self, latents: Float[Tensor, "*n c t h w"], sigma: Sigmas, condition: Prompts) -> Scores:
        """Combine the members' normalised scores.  Inputs and errors as of ``LatentReward.score``."""
        in_pass_order = [member for members in self.passes for member in members]
        logits = self.member_logits(latents, sigma, condition)
        return self.combine([m.normalisation.apply(raw) for m, raw in zip(in_pass_order, logits, strict=True)])

    def logits(self, latents: Float[Tensor, "*n c t h w"], sigma: Sigmas, condition: Prompts) -> Scores:
        """Combine the members' raw logits."""
        return self.combine(self.member_logits(latents, sigma, condition))

    def member_logits(self, latents: Tensor, sigma: Sigmas, condition: Prompts) -> list[Scores]:
        """Run the passes.  Returns each member's logits, in the order of the passes."""
        latents, sigma, condition = prepare(self.backbone, latents, sigma, condition)

        scores: list[Scores] = []
        for members in self.passes:

            def read(x: Tensor, members: list[LatentReward] = members) -> Tensor:
                return self._read(members, x, sigma, condition)

            if len(self.passes) == 1:
                logits = read(latents)
            else:
                logits = _RunAgain.apply(latents, read, members[0].selected)
            # (members, b, dimensions): one dictionary a member
            scores += [dict(zip(self.dimensions, member_logits.unbind(1), strict=True)) for member_logits in logits]
        return scores

    def _read(self, members: list[LatentReward], latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Run one pass for members that read the same hidden states.  Returns logits (members, b, dimensions)."""
        blocks = sorted({block for member in members for block in member.blocks})
        with members[0].selected():
            states = dict(zip(blocks, self.backbone.features(latents, sigma, condition, blocks), strict=True))

        logits = []
        for member in members:
            order = [member.dimensions.index(name) for name in self.dimensions]  # the members' may differ
            logits.append(member.head([states[block] for block in member.blocks], sigma)[:, order])
        return torch.stack(logits)

    def combine(self, members: Sequence[Scores]) -> Scores:
        """Return the pessimistic mean of the members' scores, and ``uncertainty``; each (b,)."""
        combined, deviations = Scores(), []
        for name in self.dimensions:
            scores = torch.stack([member[name] for member in members])  # (members, b)
            deviations.append(scores.std(0, correction=0))  # where all agree torch gives it the gradient 0
            combined[name] = scores.mean(0) - self.uncertainty_weight * deviations[-1]
        return combined | {UNCERTAINTY: torch.stack(deviations).mean(0).detach()}


class _RunAgain(torch.autograd.Function):
    """Runs a pass without a graph; the backward pass runs it again under the adapter that it had, and frees it at once.

    torch's own checkpoint would leave this graph's backward to whichever adapter is active by then.
    """

    @staticmethod
    def forward(
        ctx: Any, latents: Tensor, read: Callable[[Tensor], Tensor], selected: Callable[[], AbstractContextManager]
    ) -> Tensor:
        ctx.save_for_backward(latents)
        ctx.read, ctx.selected = read, selected
        return read(latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        leaf = ctx.saved_tensors[0].detach().requires_grad_()
        with ctx.selected(), torch.enable_grad():
            return torch.autograd.grad(ctx.read(leaf), leaf, gradients[0])[0], None, None
