"""Losses of reward training, all means over the entries that carry a label; nan marks a missing one.

A preference between a and b is 1 (a is better), 0 (b is better), 0.5 (a tie) or nan (not judged).
Logits and preferences are (b,); every loss is finite for any finite logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prfl.utils.errors import PrflError

Batch = Float[Tensor, " b"]
Scalar = Float[Tensor, ""]


def mean_where_labelled(loss: Batch, label: Batch) -> Scalar:
    """Average ``loss`` over entries whose label is not nan.  Raises PrflError when there is none."""
    present = ~label.isnan()
    if not present.any():
        raise PrflError(
            "no entry of this batch has a label for the reward dimension",
            fix="label some of the videos for it, or leave the dimension out of the reward",
        )
    return loss[present].mean()


def bce(logit: Batch, label: Batch) -> Scalar:
    """Compute the cross-entropy of sigmoid(logit) with a label in [0, 1]."""
    loss = F.binary_cross_entropy_with_logits(logit, label.nan_to_num(0.5).to(logit), reduction="none")
    return mean_where_labelled(loss, label)


def bradley_terry(a: Batch, b: Batch, preference: Batch) -> Scalar:
    """Compute the cross-entropy of P(a > b) = sigmoid(a - b).

    The model has no outcome for a tie: its target is 1/2, which pulls the two scores together.
    """
    return bce(a - b, preference)


def rao_kupper_log_probabilities(a: Batch, b: Batch, eta: float) -> tuple[Batch, Batch, Batch]:
    """Compute log P(a wins), log P(b wins), log P(tie) of Bradley-Terry with ties (Rao and Kupper, 1967).

    P(a wins) = e^a / (e^a + eta e^b);  P(tie) = (eta^2 - 1) e^(a+b) / ((e^a + eta e^b) (eta e^a + e^b)).
    PRISM (arXiv 2606.20310) prints the first with eta on the other term: that one is capped at 1 / eta and the
    three do not sum to one.
    """
    if not eta > 1:
        raise PrflError(f"Rao-Kupper needs eta > 1 for ties to have a probability, got {eta}", fix="eta: 5 is PRISM's")
    log_eta = math.log(eta)
    a_or_tie = torch.logaddexp(a, log_eta + b)
    b_or_tie = torch.logaddexp(log_eta + a, b)
    return a - a_or_tie, b - b_or_tie, math.log(eta**2 - 1) + a + b - a_or_tie - b_or_tie


def rao_kupper(a: Batch, b: Batch, preference: Batch, eta: float = 5.0) -> Scalar:
    """Compute the negative log likelihood under Rao-Kupper; at eta = 5 two equal scores tie with probability 2/3."""
    a_wins, b_wins, tie = rao_kupper_log_probabilities(a, b, eta)
    loss = -torch.where(preference == 1, a_wins, torch.where(preference == 0, b_wins, tie))
    return mean_where_labelled(loss, preference)


def thurstone_variance(sigma: Batch) -> Batch:
    """Compute the variance of a difference of two scores at sigma: 2 (2 sigma^2 + 0.05), as in DiNa-LRM."""
    return 2 * (2 * sigma**2 + 0.05)


def thurstone(a: Batch, b: Batch, preference: Batch, sigma: Batch) -> Scalar:
    """Compute the cross-entropy of P(a > b) = Phi((a - b) / sqrt(variance(sigma))).

    The noisier the latents, the less a difference has to mean.  A tie has target 1/2, as in ``bradley_terry``.  Both
    sides are at ``sigma``.
    """
    z = (a - b) / thurstone_variance(sigma).to(a).sqrt()
    target = preference.nan_to_num(0.5).to(a)
    loss = -target * torch.special.log_ndtr(z) - (1 - target) * torch.special.log_ndtr(-z)
    return mean_where_labelled(loss, preference)
