"""Metrics against brute force, and intervals against what they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from prfl.evaluation import metrics


def samples(prompts: int = 7, each: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Scores that are often equal, labels, and prompts whose samples do not lie together."""
    draw = torch.Generator().manual_seed(seed)
    names = [f"prompt {number}" for number in range(prompts)] * each
    labels = torch.randint(2, (len(names),), generator=draw).float()
    scores = torch.randint(6, (len(names),), generator=draw).float() + labels
    return scores, labels, names


def brute_pairs(labels, prompts):
    size = len(prompts)
    return [(i, j) for i in range(size) for j in range(i) if prompts[i] == prompts[j]]


def test_pairwise_accuracy_is_that_of_a_double_loop():
    scores, labels, prompts = samples()
    right = compared = 0.0
    for i, j in brute_pairs(labels, prompts):
        if labels[i] != labels[j]:
            good, bad = (i, j) if labels[i] > labels[j] else (j, i)
            right += float(scores[good] > scores[bad]) + 0.5 * float(scores[good] == scores[bad])
            compared += 1
    pairs = metrics.pairs_within(labels, prompts)
    assert len(pairs.decided()) == compared
    assert metrics.pairwise_accuracy(scores, pairs).value == pytest.approx(right / compared)


def test_pairs_never_join_two_prompts_and_skip_missing_labels():
    _, labels, prompts = samples()
    labels[3] = math.nan
    pairs = metrics.pairs_within(labels, prompts)
    for first, second, outcome in zip(pairs.first.tolist(), pairs.second.tolist(), pairs.outcome.tolist(), strict=True):
        assert prompts[first] == prompts[second]
        assert float(labels[first] - labels[second]) == outcome
    assert 3 not in pairs.first.tolist() + pairs.second.tolist()


def test_a_score_that_knows_only_the_prompt_is_at_chance_within_prompts_but_not_across():
    prompts = [f"prompt {number}" for number in range(20) for _ in range(10)]
    hard = torch.arange(20).repeat_interleave(10) / 20
    labels = (torch.rand(200, generator=torch.Generator().manual_seed(1)) > hard).float()
    assert metrics.pairwise_accuracy(-hard, metrics.pairs_within(labels, prompts)).value == 0.5
    assert metrics.auc(-hard, labels, prompts).value > 0.75


def test_shuffled_labels_give_one_half():
    _, labels, prompts = samples(prompts=60, each=10)
    perfect = metrics.pairwise_accuracy(labels, metrics.pairs_within(labels, prompts))
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    noise = torch.rand(len(labels), generator=torch.Generator().manual_seed(4)) * 0.1
    planted = metrics.pairwise_accuracy(shuffled + noise, metrics.pairs_within(labels, prompts))
    assert perfect.value == 1.0
    assert planted.value == pytest.approx(0.5, abs=0.04)
    assert planted.low < 0.5 < planted.high


def test_ties_threshold_is_the_best_of_all():
    scores, labels, prompts = samples(seed=5)
    scores = torch.stack([scores, scores.roll(3)])  # two noise draws
    pairs = metrics.pairs_within(labels, prompts)
    chosen = metrics.tie_threshold(scores, pairs)
    tried = [metrics.pairwise_accuracy_ties(scores, pairs, t, 10).value for t in torch.arange(0, 8, 0.25).tolist()]
    assert metrics.pairwise_accuracy_ties(scores, pairs, chosen, 10).value == pytest.approx(max(tried))


def test_accuracy_with_ties_is_that_of_a_double_loop():
    scores, labels, prompts = samples(seed=6)
    right = []
    for i, j in brute_pairs(labels, prompts):
        if labels[i] == labels[j]:
            right.append(abs(scores[i] - scores[j]) <= 1.5)
        else:
            right.append((scores[i] - scores[j]) * (labels[i] - labels[j]) > 1.5)
    pairs = metrics.pairs_within(labels, prompts)
    expected = sum(map(float, right)) / len(right)
    assert metrics.pairwise_accuracy_ties(scores, pairs, 1.5).value == pytest.approx(expected)


def test_without_equal_labels_no_tie_is_called():
    pairs = metrics.pairs_within(torch.tensor([1.0, 0.0, 1.0, 0.0]), ["a", "a", "b", "b"])
    scores = torch.tensor([2.0, 1.0, 5.0, 1.0])
    assert metrics.pairwise_accuracy_ties(scores, pairs, metrics.tie_threshold(scores, pairs)).value == 1


def test_equal_scores_call_a_tie_even_where_the_threshold_is_zero():
    """A head that says the same of everything is right of no pair that people decided."""
    pairs = metrics.pairs_within(torch.tensor([1.0, 0.0, 0.0]), ["a"] * 3)
    assert metrics.pairwise_accuracy_ties(torch.zeros(3), pairs.decided(), 0.0).value == 0
    assert metrics.pairwise_accuracy_ties(torch.zeros(3), pairs, 0.0).value == pytest.approx(1 / 3), "the tie"


def test_auc_and_calibration_are_torchmetrics():
    scores, labels, prompts = samples(prompts=30, each=6, seed=7)
    # Within 0 and 1 torchmetrics takes no sigmoid, whose last bit may differ between equal scores.
    within = (scores - scores.min()) / (scores.max() - scores.min())
    assert metrics.auc(scores, labels, prompts).value == pytest.approx(float(binary_auroc(within, labels.long())))
    probability = torch.rand(len(labels), generator=torch.Generator().manual_seed(8))
    error, table = metrics.calibration_error(probability, labels, prompts, bins=10)
    reference = binary_calibration_error(probability, labels.long(), n_bins=10, norm="l1")
    bins = zip(table.count, table.observed, table.predicted, strict=True)
    plain = sum(count * abs(observed - predicted) for count, observed, predicted in bins) / len(labels)
    assert plain == pytest.approx(float(reference), abs=1e-6)
    assert sum(table.count) == len(labels) and error.value < plain, "less what chance adds"


def test_interval_covers_as_often_as_it_says():
    """60 simulated studies of 40 prompts: a 90 % interval misses about 6 times; 95 % would be too few to see."""
    draw = torch.Generator().manual_seed(0)
    prompts = [str(number) for number in range(40) for _ in range(4)]
    covered = 0
    for _ in range(60):
        values = torch.randn(40, generator=draw).repeat_interleave(4) + torch.randn(160, generator=draw)
        number, count = metrics.group(prompts)
        total, size = metrics.per_prompt(values, number, count), torch.full((count,), 4.0, dtype=torch.float64)
        interval = metrics.bootstrap(
            lambda times, total=total, size=size: (times @ total) / (times @ size), count, 300, 0.9
        )
        covered += interval.low <= 0 <= interval.high
    assert 46 <= covered <= 60


def test_clustered_interval_is_wider_than_one_that_takes_samples_for_independent():
    draw = torch.Generator().manual_seed(2)
    values = torch.randn(30, generator=draw).repeat_interleave(10) + 0.1 * torch.randn(300, generator=draw)
    clustered = metrics.mean_interval(values, [str(n) for n in range(30) for _ in range(10)])
    independent = metrics.mean_interval(values, [str(n) for n in range(300)])
    assert clustered.value == pytest.approx(independent.value)
    assert clustered.high - clustered.low > 2 * (independent.high - independent.low)


def test_paired_difference_is_narrower_than_either_mean():
    draw = torch.Generator().manual_seed(3)
    prompts = [str(n) for n in range(40) for _ in range(4)]
    before = torch.randn(160, generator=draw)
    after = before + 0.3 + 0.1 * torch.randn(160, generator=draw)
    difference = metrics.difference_interval(after, before, prompts)
    single = metrics.mean_interval(after, prompts)
    assert difference.low < 0.3 < difference.high
    assert difference.high - difference.low < 0.3 * (single.high - single.low)


def test_missing_values_are_left_out_of_a_mean():
    interval = metrics.mean_interval(torch.tensor([1.0, math.nan, 3.0]), ["a", "a", "b"])
    assert interval.value == 2.0


def test_diversity_is_the_mean_distance_of_two_samples_of_one_prompt():
    videos = torch.randn(5, 3, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    spread = metrics.diversity(videos, ["a", "b", "a", "b", "a"])
    distance = [((videos[i] - videos[j]) ** 2).mean().sqrt() for i, j in ((0, 2), (0, 4), (2, 4))]
    assert spread["a"] == pytest.approx(float(sum(distance)) / 3, rel=1e-5)
    assert metrics.diversity(videos[:1].repeat(3, 1, 1, 1, 1), ["a"] * 3) == {"a": 0.0}
    assert metrics.diversity(videos[:1], ["a"]) == {}


def test_motion_is_zero_for_a_still_video_and_the_step_for_a_ramp():
    still = torch.ones(1, 2, 4, 3, 3)
    ramp = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 2, 4, 3, 3)
    assert metrics.motion(torch.cat([still, ramp * 0.5])).tolist() == pytest.approx([0.0, 0.5])
