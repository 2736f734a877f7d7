"""Measures, each with an interval that is honest about prompts.

Samples of one prompt are alike, so an interval that treats them as independent is too narrow.  Every statistic here
is a function of how often each *prompt* is drawn; the percentile bootstrap resamples prompts, never samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prfl.utils.rng import generator

RESAMPLES = 1000

Statistic = Callable[[Float[Tensor, "r k"]], Float[Tensor, " r"]]
"""(how often each of k prompts is drawn, in each of r resamples) -> each resample's statistic (nan: undefined)."""


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(statistic: Statistic, prompts: int, resamples: int = RESAMPLES, level: float = 0.95) -> Interval:
    """Compute the statistic on all prompts, and the percentile interval over resampled prompts.

    Resamples in which the statistic is undefined (no pair was drawn, say) are left out.
    """
    value = statistic(torch.ones(1, prompts, dtype=torch.float64))
    low, high = torch.nanquantile(statistic(resampled(prompts, resamples)), tails(level)).tolist()
    return Interval(float(value), low, high)


def resampled(prompts: int, resamples: int) -> Float[Tensor, "r k"]:
    """Count how often each prompt is drawn in each resample."""
    drawn = torch.randint(prompts, (resamples, prompts), generator=generator(0, "bootstrap", 0))
    ones = torch.ones(resamples, prompts, dtype=torch.float64)
    return torch.zeros(resamples, prompts, dtype=torch.float64).scatter_add_(1, drawn, ones)


def tails(level: float = 0.95) -> Float[Tensor, 2]:
    """Return the two quantiles that enclose a share of ``level``."""
    return torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)


def group(prompts: Sequence[str]) -> tuple[Int[Tensor, " n"], int]:
    """Number each sample's prompt, in order of first appearance; returns the count of prompts too."""
    order = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([order[prompt] for prompt in prompts], dtype=torch.long), len(order)


def per_prompt(values: Float[Tensor, " n"], number: Int[Tensor, " n"], prompts: int) -> Float[Tensor, " k"]:
    """Sum the values over the samples of each prompt, float64."""
    return torch.zeros(prompts, dtype=torch.float64).index_add_(0, number, values.double())


def mean_interval(values: Float[Tensor, " n"], prompts: Sequence[str], resamples: int = RESAMPLES) -> Interval:
    """Average over samples, with an interval over prompts; nan values are left out."""
    number, count = group(prompts)
    valid = ~values.isnan()
    total = per_prompt(values.nan_to_num(), number, count)
    size = per_prompt(valid.double(), number, count)
    return bootstrap(lambda times: (times @ total) / (times @ size), count, resamples)


def difference_interval(
    after: Float[Tensor, " n"], before: Float[Tensor, " n"], prompts: Sequence[str], resamples: int = RESAMPLES
) -> Interval:
    """Average after - before, paired sample by sample, with an interval over prompts."""
    return mean_interval(after - before, prompts, resamples)


# --- pairs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Pairs of samples of one prompt.  outcome: 1 where ``first`` is the better, 0 where they are equal."""

    first: Int[Tensor, " p"]
    second: Int[Tensor, " p"]
    outcome: Int[Tensor, " p"]
    prompt: Int[Tensor, " p"]
    prompts: int

    def __len__(self) -> int:
        return len(self.first)

    def decided(self) -> Pairs:
        """Leave out the ties."""
        keep = self.outcome != 0
        return Pairs(self.first[keep], self.second[keep], self.outcome[keep], self.prompt[keep], self.prompts)


def pairs_within(labels: Float[Tensor, " n"], prompts: Sequence[str]) -> Pairs:
    """List every pair of samples of one prompt whose labels are known, the better one first; no margin filter."""
    number, count = group(prompts)
    rows: list[tuple[int, int, int, int]] = []
    for prompt in range(count):
        members = (number == prompt).nonzero().flatten().tolist()
        for i, j in combinations([m for m in members if not labels[m].isnan()], 2):
            if labels[i] >= labels[j]:
                rows.append((i, j, int(labels[i] != labels[j]), prompt))
            else:
                rows.append((j, i, 1, prompt))
    table = torch.tensor(rows, dtype=torch.long).reshape(-1, 4)
    better_row, worse_row, decided, prompt_number = table.unbind(1)
    return Pairs(better_row, worse_row, decided, prompt_number, count)


def pairwise_accuracy(scores: Float[Tensor, "*d n"], pairs: Pairs, resamples: int = RESAMPLES) -> Interval:
    """Compute the share of decided pairs that the scores order rightly; equal scores count one half.

    scores: leading dimensions (noise draws) are averaged over; a pair is compared within one draw.
    """
    pairs = pairs.decided()
    margin = scores[..., pairs.first] - scores[..., pairs.second]
    right = (margin > 0).double() + 0.5 * (margin == 0)
    return _share(right, pairs, resamples)


def pairwise_accuracy_ties(
    scores: Float[Tensor, "*d n"], pairs: Pairs, threshold: float, resamples: int = RESAMPLES
) -> Interval:
    """Compute the share of all pairs, ties too, that are called rightly.

    A margin of at most ``threshold`` calls a tie, so equal scores always do; a decided pair is right with more.
    """
    margin = (scores[..., pairs.first] - scores[..., pairs.second]).double()
    right = torch.where(pairs.outcome == 0, margin.abs() <= threshold, margin > threshold)
    return _share(right.double(), pairs, resamples)


def _share(right: Float[Tensor, "*d p"], pairs: Pairs, resamples: int = RESAMPLES) -> Interval:
    """Average over pairs, with an interval over prompts."""
    share = right.reshape(-1, len(pairs)).mean(0)
    won = per_prompt(share, pairs.prompt, pairs.prompts)
    compared = per_prompt(torch.ones(len(pairs)), pairs.prompt, pairs.prompts)
    return bootstrap(lambda times: (times @ won) / (times @ compared), pairs.prompts, resamples)


def tie_threshold(scores: Float[Tensor, "*d n"], pairs: Pairs) -> float:
    """Find the threshold under which ``pairwise_accuracy_ties`` is highest on these (training) samples.

    (Deutsch, Foster, Freitag, "Ties Matter", arXiv 2305.14324, call it tie calibration.)
    """
    margin = (scores[..., pairs.first] - scores[..., pairs.second]).reshape(-1, len(pairs))
    tied = (pairs.outcome == 0).expand_as(margin)

    # As the threshold passes a pair's margin upward, a tie becomes right and a rightly ordered pair becomes wrong.
    change = torch.where(tied, 1, -(margin > 0).long())
    size, order = margin.abs().flatten().sort()
    gain = torch.cat([torch.zeros(1, dtype=torch.long), change.flatten()[order].cumsum(0)])

    # Pass all pairs of one size together: only the last of equal sizes is a threshold that can be had.
    edges = torch.cat([torch.zeros(1, dtype=size.dtype), size])
    reachable = torch.cat([edges[1:] != edges[:-1], torch.ones(1, dtype=torch.bool)])
    best = int(torch.where(reachable, gain, gain.min() - 1).argmax())

    # Behind the largest margin, below the smallest, or in the middle between two.
    if best == len(size):
        return float(size[-1]) * (1 + 1e-6) + 1e-12 if len(size) else 0.0
    return 0.0 if best == 0 else float((size[best - 1].double() + size[best].double()) / 2)


# --- over all samples -----------------------------------------------------------------------------------------------


def auc(
    scores: Float[Tensor, " n"], labels: Float[Tensor, " n"], prompts: Sequence[str], resamples: int = RESAMPLES
) -> Interval:
    """Compute the area under the ROC curve over *all* samples, whatever their prompt.

    A label above 0.5 is good; equal scores count one half.  Across prompts a score may do well by knowing which prompts
    are hard; compare it with its value at sigma = 1.
    """
    number, count = group(prompts)
    labelled = ~labels.isnan()
    value, rank = scores[labelled].unique(return_inverse=True)
    good, prompt = labels[labelled] > 0.5, number[labelled]

    statistic = partial(_roc_area, rank=rank, ranks=len(value), good=good, prompt=prompt)
    return bootstrap(statistic, count, resamples)


def _roc_area(times: Tensor, rank: Tensor, ranks: int, good: Tensor, prompt: Tensor) -> Tensor:
    """Compute the area of each resample.  times: (r, prompts), how often each counts.  rank: of each score."""
    weight = times[:, prompt]
    zeros = torch.zeros(len(times), ranks, dtype=times.dtype)
    above = zeros.index_add(1, rank[good], weight[:, good])
    below = zeros.index_add(1, rank[~good], weight[:, ~good])
    won = (above * (below.cumsum(1) - below / 2)).sum(1)
    return won / (above.sum(1) * below.sum(1))


@dataclass(frozen=True)
class Reliability:
    """By bin of the predicted probability: the mean prediction, the share of good samples, how many there are."""

    predicted: list[float]
    observed: list[float]
    count: list[int]


@dataclass(frozen=True, eq=False)
class _Binned:
    """Samples in bins of their probability.  times, (r, prompts): how often each prompt counts, in r resamples."""

    bin_index: Tensor
    bins: int
    prompt: Tensor
    probability: Tensor
    label: Tensor

    def sums(self, times: Tensor, values: Tensor) -> Tensor:
        """Add the samples' values up in each bin: (r, bins)."""
        of_each_prompt = torch.zeros(times.shape[1], self.bins, dtype=times.dtype)
        of_each_prompt.index_put_((self.prompt, self.bin_index), values, accumulate=True)
        return times @ of_each_prompt

    def error(self, times: Tensor) -> Tensor:
        """Compute the expected calibration error of each resample: (r,)."""
        size = self.sums(times, torch.ones_like(self.probability)).sum(1)
        return (self.sums(times, self.label) - self.sums(times, self.probability)).abs().sum(1) / size


def calibration_error(
    probabilities: Float[Tensor, " n"],
    labels: Float[Tensor, " n"],
    prompts: Sequence[str],
    bins: int = 10,
    resamples: int = RESAMPLES,
) -> tuple[Interval, Reliability]:
    """Compute the expected calibration error, less what chance adds to it, and the table of a reliability plot.

    It is |share of good ones - mean probability| over equal-width bins, weighted by size.  Chance makes such a distance
    larger, hardly ever smaller: a perfect score of 400 samples has 0.055.  Resampling adds as much again, in squares,
    as sampling did: what the resamples' median has more is taken off the value.  A resample has it twice, so it is
    taken twice off the lower end; off the upper one only once, because it adds less where the error is large.  Over
    simulated scores the interval covers the true error in 91 to 99 of 100, where plain percentiles cover one of 0.02
    in none (tests/evaluation/test_calibration.py).
    """
    number, count = group(prompts)
    labelled = ~labels.isnan()
    probability = probabilities[labelled].double()
    label = (labels[labelled] > 0.5).double()
    prompt = number[labelled]
    bin_index = (probability * bins).long().clamp(0, bins - 1)

    samples = _Binned(bin_index, bins, prompt, probability, label)

    # The table: every sample once.
    once = torch.ones(1, count, dtype=torch.float64)
    size = samples.sums(once, torch.ones_like(probability))[0]
    observed = samples.sums(once, label)[0]
    predicted = samples.sums(once, probability)[0]
    filled = size > 0
    table = Reliability(
        predicted=(predicted / size)[filled].tolist(),
        observed=(observed / size)[filled].tolist(),
        count=size[filled].long().tolist(),
    )

    # The error and its interval, in squares, less what chance adds.
    error_squared = samples.error(once).square()
    resampled_squared = samples.error(resampled(count, resamples)).square()
    chance_adds = (resampled_squared.nanmedian() - error_squared).clamp(min=0)
    value = (error_squared - chance_adds).clamp(min=0).sqrt()
    lower, upper = torch.nanquantile(resampled_squared, tails())
    low = (lower - 2 * chance_adds).clamp(min=0).sqrt()
    high = (upper - chance_adds).clamp(min=0).sqrt()
    return Interval(float(value), float(torch.minimum(low, value)), float(torch.maximum(high, value))), table


# --- of the videos themselves ---------------------------------------------------------------------------------------


def diversity(videos: Float[Tensor, "n c t h w"], prompts: Sequence[str]) -> dict[str, float]:
    """Average, for each prompt with two samples or more, the root-mean-square difference between two of them.

    videos: decoded pixels or latents, in whose unit the result is.  A collapsed generator has 0.
    """
    number, count = group(prompts)
    names = list(dict.fromkeys(prompts))
    spread: dict[str, float] = {}
    for prompt in range(count):
        members = videos[number == prompt].flatten(1).double()
        if len(members) > 1:
            spread[names[prompt]] = float(torch.nn.functional.pdist(members).mean() / members.shape[1] ** 0.5)
    return spread


def diversity_interval(spread: dict[str, float], resamples: int = RESAMPLES) -> Interval:
    """Average ``diversity`` over prompts."""
    return mean_interval(torch.tensor(list(spread.values()), dtype=torch.float64), list(spread), resamples)


def motion(latents: Float[Tensor, "n c t h w"]) -> Float[Tensor, " n"]:
    """Average the absolute difference between neighbouring latent frames: less when a policy learns to stand still."""
    return latents.diff(dim=2).abs().flatten(1).float().mean(1)
