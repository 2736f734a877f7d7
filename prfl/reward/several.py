"""Several rewards followed at once: each is differentiated by itself at the decoded pixels, then the decoder once.

    g[k] = d(loss's part of reward k) / d pixels;    the decoder gets  g = sum over k of g[k]

With ``balance: gradient_norm`` each reward has the share of the gradient that its weights say, however steep it is:

    g = N sum over k of W[k] g[k] / |g[k]|,    N = sum over k of |g[k]| / sum over k of W[k]

for each video by itself, |.| over its pixels, W[k] the sum of the absolute weights of reward k's dimensions; a reward
without a gradient is left out of all three sums.  The sum of the lengths is as before, so the loss's scale means the
same, and with equal weights a reward that is nearly flat is followed as closely as a steep one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone.condition import Condition
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelReward
from prfl.reward.public import PublicReward
from prfl.reward.scores import Normalisation, Scores
from prfl.utils.errors import PrflError

Balance = Literal["none", "gradient_norm"]


class Read(NamedTuple):
    """The scores of one reward, as a graph from its own copy of the pixels."""

    pixels: Tensor
    scores: list[Tensor]
    share: float


class Apart(torch.autograd.Function):
    """Joins the scores of several rewards to the pixels that they were read at; backward takes one after another."""

    @staticmethod
    def forward(context: Any, pixels: Tensor, reads: list[Read], balance: Balance) -> tuple[Tensor, ...]:
        context.reads, context.balance = reads, balance
        return tuple(scores.detach() for read in reads for scores in read.scores)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        upstream, parts = iter(gradients), []
        reads, context.reads = context.reads, None  # each graph is freed when its gradient is there
        while reads:
            read = reads.pop(0)
            outputs = [(scores, next(upstream)) for scores in read.scores]
            outputs = [(scores, gradient) for scores, gradient in outputs if scores.requires_grad]
            if outputs:
                scores, of_scores = zip(*outputs, strict=True)
                parts.append((torch.autograd.grad(scores, read.pixels, of_scores)[0], read.share))
                if context.balance == "none" and len(parts) == 2:
                    parts = [(parts[0][0] + parts[1][0], 1.0)]
        total = None if not parts else parts[0][0] if len(parts) == 1 else balanced(parts)
        return total, None, None


def balanced(parts: Sequence[tuple[Float[Tensor, b * pixels], float]]) -> Float[Tensor, b * pixels]:
    """Add the gradients of several rewards with the shares of their weights, by the module's equation."""
    wide = torch.promote_types(parts[0][0].dtype, torch.float32)
    least = torch.finfo(wide).tiny
    lengths = [
        torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=wide).view(-1, *[1] * (gradient.ndim - 1))
        for gradient, _ in parts
    ]
    shares = [share * (length > 0).to(wide) for length, (_, share) in zip(lengths, parts, strict=True)]
    factor = torch.stack(lengths).sum(0) / torch.stack(shares).sum(0).clamp(min=least)
    units = [
        share * gradient / length.clamp(min=least)
        for (gradient, _), length, share in zip(parts, lengths, shares, strict=True)
    ]
    return (factor * torch.stack(units).sum(0)).to(parts[0][0].dtype)


class SeveralRewards:
    """Several public rewards as one: the scores of each beside those of the others.

    weights: of the dimensions; None is 1 each.  They say the shares of ``balance: gradient_norm``, no more.
    Raises PrflError where two of them have a score of the same name.
    """

    space = "pixel"
    noise_aware = False
    card = None

    def __init__(
        self, members: Sequence[PublicReward], weights: Mapping[str, float] | None = None, balance: Balance = "none"
    ) -> None:
        self.members, self.balance = members, balance
        self.dimensions = tuple(name for member in members for name in member.dimensions)
        check_names(self.dimensions)
        self.weights = dict.fromkeys(self.dimensions, 1.0) if weights is None else weights

    @property
    def normalisation(self) -> Normalisation:
        return Normalisation.none(self.dimensions)

    @property
    def differentiable(self) -> bool:
        return all(member.differentiable for member in self.members)

    @property
    def frames_at_once(self) -> int | None:
        counts = [member.frames_at_once for member in self.members]
        return None if None in counts else max(count for count in counts if count is not None)

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Score videos.  A reward checkpoints its frames, so that none holds activations while another is read."""
        if not (torch.is_grad_enabled() and pixels.requires_grad):
            return {name: s for member in self.members for name, s in member(pixels, condition, times).items()}
        reads, names = [], []
        for member in self.members:
            leaf = pixels.detach().requires_grad_()
            scores = member(leaf, condition, times)
            names += list(scores)
            share = sum(abs(self.weights.get(name, 0.0)) for name in scores)
            reads.append(Read(leaf, list(scores.values()), share))
        return dict(zip(names, Apart.apply(pixels, reads, self.balance), strict=True))

    def logits(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        return self(pixels, condition, times)

    def parameters(self) -> Iterator[nn.Parameter]:
        for member in self.members:
            yield from member.parameters()


class LatentBeside:
    """A latent reward beside one on decoded pixels, both of the same clean latents.

    It is for methods that read their reward at the end of the chain, or at a clean prediction: the pixel one is not
    noise-aware.  ``scorer.JointScorer`` reads it.  Raises PrflError where both have a score of the same name.
    """

    space = "pixel"
    noise_aware = False
    card = None

    def __init__(self, latent: LatentReward, pixel: PixelReward | PublicReward) -> None:
        self.latent, self.pixel = latent, pixel
        self.dimensions = (*latent.dimensions, *pixel.dimensions)
        check_names(self.dimensions)

    @property
    def differentiable(self) -> bool:
        return self.pixel.differentiable

    @property
    def normalisation(self) -> Normalisation:
        first, second = self.latent.normalisation, self.pixel.normalisation
        return Normalisation(first.mean | second.mean, first.std | second.std)

    def parameters(self) -> Iterator[nn.Parameter]:
        for member in (self.latent, self.pixel):
            parameters = member.parameters()
            yield from parameters.values() if isinstance(parameters, dict) else parameters


def check_names(dimensions: Sequence[str]) -> None:
    if twice := {name for name in dimensions if dimensions.count(name) > 1}:
        fix = "leave one of them out, or let your own function return another name"
        raise PrflError(f"two rewards score '{min(twice)}'", where="reward", fix=fix)
