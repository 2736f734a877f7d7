from __future__ import annotations

import math

import pytest
import torch

from prfl.reward import losses
from prfl.utils.errors import PrflError

A = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=torch.float64)
B = torch.tensor([-0.5, 0.7, 2.0, 3.1], dtype=torch.float64)
NAN = float("nan")


def test_bce_is_the_log_probability_of_the_label():
    label = torch.tensor([1.0, 0.0, 1.0, 0.25], dtype=torch.float64)
    p = A.sigmoid()
    expected = -(label * p.log() + (1 - label) * (1 - p).log()).mean()
    torch.testing.assert_close(losses.bce(A, label), expected)


def test_bradley_terry_closed_form_and_tie():
    wins = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(losses.bradley_terry(A, B, wins), -(A - B).sigmoid().log().mean())
    torch.testing.assert_close(losses.bradley_terry(A, B, 0 * wins), -(B - A).sigmoid().log().mean())
    a = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    losses.bradley_terry(a, a.detach(), torch.tensor([0.5], dtype=torch.float64)).backward()
    assert a.grad is not None and a.grad.abs().max() < 1e-12, "a tie between equal scores pulls nowhere"


@pytest.mark.parametrize("eta", [1.01, 5.0, 50.0])
def test_rao_kupper_is_a_distribution(eta):
    a_wins, b_wins, tie = (log.exp() for log in losses.rao_kupper_log_probabilities(A, B, eta))
    torch.testing.assert_close(a_wins + b_wins + tie, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(a_wins, A.exp() / (A.exp() + eta * B.exp()))
    torch.testing.assert_close(b_wins, B.exp() / (B.exp() + eta * A.exp()))


def test_rao_kupper_figures_of_prism():
    """At eta = 5 equal scores tie with probability 2/3, and a tie is the likeliest outcome up to |a - b| = 1.526."""
    zero = torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(losses.rao_kupper_log_probabilities(zero, zero, 5.0)[2].exp(), zero + 2 / 3)
    for difference, likeliest in ((1.52, 2), (1.54, 0)):
        logs = torch.stack(losses.rao_kupper_log_probabilities(zero + difference, zero, 5.0))
        assert int(logs.argmax()) == likeliest


def test_rao_kupper_with_the_printed_branch_would_be_caught():
    """The planted error: eta on the wrong term.  It is capped at 1 / eta and the outcomes do not sum to one."""
    eta = 5.0
    wrong_a, wrong_b = A.exp() / (eta * A.exp() + B.exp()), B.exp() / (eta * B.exp() + A.exp())
    tie = losses.rao_kupper_log_probabilities(A, B, eta)[2].exp()
    assert wrong_a.max() < 1 / eta
    off = (wrong_a + wrong_b + tie - 1).abs()
    assert off[A != B].min() > 0.05, "they sum to one only where the scores are equal"
    one = torch.ones(1, dtype=torch.float64)
    right = losses.rao_kupper(A[:1], B[:1], one, eta)
    assert (right + wrong_a[0].log()).abs() > 0.05, "the loss does not use the printed branch"


def test_rao_kupper_picks_the_outcome():
    logs = losses.rao_kupper_log_probabilities(A, B, 3.0)
    preference = torch.tensor([1.0, 0.0, 0.5, NAN], dtype=torch.float64)
    expected = -(logs[0][0] + logs[1][1] + logs[2][2]) / 3
    torch.testing.assert_close(losses.rao_kupper(A, B, preference, 3.0), expected)


@pytest.mark.parametrize("eta", [1.0, 0.5, NAN])
def test_rao_kupper_refuses_an_eta_without_ties(eta):
    with pytest.raises(PrflError, match="eta > 1"):
        losses.rao_kupper(A, B, torch.ones(4), eta)


def test_thurstone_closed_form_at_each_sigma():
    sigma = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    z = (A - B) / (2 * (2 * sigma**2 + 0.05)).sqrt()
    phi = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    preference = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    expected = -(preference * phi.log() + (1 - preference) * (1 - phi).log()).mean()
    torch.testing.assert_close(losses.thurstone(A, B, preference, sigma), expected)


def test_thurstone_asks_less_of_noisy_pairs():
    """The same confident and right difference is less sure, the same wrong one less punished, at higher sigma."""
    one, sigmas = torch.ones(1, dtype=torch.float64), [0.0, 0.5, 1.0]
    right = [losses.thurstone(one, 0 * one, one, s * one) for s in sigmas]
    wrong = [losses.thurstone(0 * one, one, one, s * one) for s in sigmas]
    assert right == sorted(right) and wrong == sorted(wrong, reverse=True)
    assert right[0] < right[2] and wrong[0] > wrong[2]


def pair_losses(a, b, preference):
    sigma = torch.full_like(a, 0.4)
    yield losses.bce(a - b, preference)
    yield losses.bradley_terry(a, b, preference)
    yield losses.rao_kupper(a, b, preference, 5.0)
    yield losses.thurstone(a, b, preference, sigma)


def test_gradients_against_finite_differences():
    preference = torch.tensor([1.0, 0.0, 0.5, NAN], dtype=torch.float64)
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    for which in range(4):
        assert torch.autograd.gradcheck(lambda a, b: list(pair_losses(a, b, preference))[which], (a, b))  # noqa: B023


def test_missing_labels_change_nothing():
    """Neither the loss nor a gradient: a sample without a label is as good as absent, whatever its logit."""
    with_hole = torch.tensor([1.0, NAN, 0.0, 0.5], dtype=torch.float64)
    keep = [0, 2, 3]
    a = A.clone().requires_grad_()
    for full, part in zip(pair_losses(a, B, with_hole), pair_losses(A[keep], B[keep], with_hole[keep]), strict=True):
        torch.testing.assert_close(full.detach(), part)
        assert torch.autograd.grad(full, a)[0][1] == 0


def test_no_label_at_all_is_an_error():
    for which in range(4):
        with pytest.raises(PrflError, match="no entry of this batch has a label"):
            list(pair_losses(A, B, torch.full((4,), NAN)))[which]


def test_extreme_scores_stay_finite():
    a = torch.tensor([300.0, -300.0, 300.0], requires_grad=True)
    b = torch.tensor([-300.0, 300.0, -300.0])
    for loss in pair_losses(a, b, torch.tensor([1.0, 1.0, 0.5])):
        assert loss.isfinite() and torch.autograd.grad(loss, a)[0].isfinite().all()
