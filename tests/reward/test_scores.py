from __future__ import annotations

import pytest
import torch

from prfl.reward.scores import Normalisation, total
from prfl.utils.errors import PrflError

SCORES = {"motion": torch.tensor([1.0, -2.0]), "look": torch.tensor([0.5, 30.0])}


def test_sum_and_weights():
    torch.testing.assert_close(total(SCORES), torch.tensor([1.5, 28.0]))
    torch.testing.assert_close(total(SCORES, {"motion": 2.0}), torch.tensor([2.0, -4.0]))
    torch.testing.assert_close(total(SCORES, {"motion": 1.0, "look": -0.5}), torch.tensor([0.75, -17.0]))


def test_logsigmoid_is_the_probability_that_all_labels_are_good_and_saturates():
    both = total(SCORES, shape="logsigmoid")
    torch.testing.assert_close(both.exp(), SCORES["motion"].sigmoid() * SCORES["look"].sigmoid())
    look = torch.tensor([0.5, 30.0], requires_grad=True)
    total({"look": look}, shape="logsigmoid").sum().backward()
    assert look.grad[0] > 0.3 and look.grad[1] < 1e-9, "nothing to gain from a score that is good already"


@pytest.mark.parametrize("weights, match", [({"moton": 1.0}, "no such reward dimension: moton"), ({}, "no reward")])
def test_wrong_weights(weights, match):
    with pytest.raises(PrflError, match=match):
        total(SCORES, weights)


def test_normalisation_centres_validation_scores():
    logits = {"motion": torch.tensor([1.0, 2.0, 6.0])}
    scores = Normalisation.of(logits).apply(logits)["motion"]
    torch.testing.assert_close(scores.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.std(), torch.tensor(1.0))
    assert torch.equal(Normalisation.none(["motion"]).apply(logits)["motion"], logits["motion"])


def test_scores_that_do_not_vary_cannot_be_calibrated():
    for values in (torch.ones(4), torch.ones(1)):
        with pytest.raises(PrflError, match="do not vary"):
            Normalisation.of({"motion": values, "look": torch.tensor([0.0, 1.0])})
