"""Measures how well scorers rank noisy latents: several of them side by side, by noise level, on held-out labels.

The measure that matters is pairwise accuracy *within a prompt*.  At sigma = 1 the latents are pure noise: what a
scorer reaches there is the floor, and an AUC above one half there is knowledge of the prompt, not of the video.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone import Backbone, Condition
from prfl.data.dataset import LatentDataset, PairDataset
from prfl.evaluation import metrics
from prfl.evaluation.metrics import Interval, Pairs, Reliability
from prfl.reward.pixel import PixelReward
from prfl.reward.public import PublicReward
from prfl.reward.scores import Scores, total
from prfl.rollout.flow import add_noise, clean_prediction
from prfl.rollout.sampling import Progress
from prfl.utils import processes, rng
from prfl.utils.files import atomic_write, whole_json

Scorer = Callable[[Float[Tensor, "b c t h w"], Float[Tensor, " b"], Condition], Scores]
"""(latents at sigma, sigma, condition) -> raw logits by dimension; ``LatentReward.logits`` is one."""

EDGES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)
POINTS = (0.0, 0.5, 0.8, 0.95, 1.0)
OVERALL = "all"


@dataclass(frozen=True)
class Level:
    """A noise level: sigma drawn evenly from [low, high], once for all samples of a prompt; low = high is a point."""

    kind: Literal["bin", "point", "sampler"]
    low: float
    high: float

    @property
    def label(self) -> str:
        if self.low == self.high:
            return f"{self.low:.3f}" + (" (floor)" if self.low == 1 else "")
        return f"{self.low:g}-{self.high:g}"


def levels(sampler_sigmas: Sequence[float] = (), edges: Sequence[float] = EDGES) -> list[Level]:
    """List the noise levels: bins between edges, a few points, and the sampler's own sigmas."""
    bins = [Level("bin", low, high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    points = [Level("point", sigma, sigma) for sigma in POINTS]
    return bins + points + [Level("sampler", float(sigma), float(sigma)) for sigma in sampler_sigmas]


def up_to(all_levels: Sequence[Level], highest: float) -> list[Level]:
    """Leave out the noise levels above ``highest``; a bin that holds it ends there."""
    below = [replace(level, high=min(level.high, highest)) for level in all_levels if level.low <= highest]
    return [level for level in below if level.low < level.high or level in all_levels]


@dataclass(frozen=True)
class HeldOut:
    """Labelled samples.  labels: {} where people compared pairs; pairs: all of one prompt, by dimension.

    kinds: numbers of the samples' shapes, where there are several.
    """

    get: Callable[[list[int]], tuple[Tensor, Condition]]
    prompts: list[str]
    labels: dict[str, Tensor]
    pairs: dict[str, Pairs]
    kinds: Sequence[int] = ()

    def batches(self, size: int) -> list[list[int]]:
        """Part the samples into batches of one shape, in order."""
        kinds = self.kinds or [0] * len(self.prompts)
        members = [[index for index, each in enumerate(kinds) if each == kind] for kind in sorted(set(kinds))]
        return [of_kind[start : start + size] for of_kind in members for start in range(0, len(of_kind), size)]

    def head(self, count: int) -> HeldOut:
        """Take the first samples only, and the pairs among them (a manifest of pairs stays whole)."""
        if not self.labels or count >= len(self.prompts):
            return self
        labels = {name: values[:count] for name, values in self.labels.items()}
        prompts = self.prompts[:count]
        pairs = {name: metrics.pairs_within(values, prompts) for name, values in labels.items()}
        return HeldOut(self.get, prompts, labels, pairs, self.kinds[:count])


def held_out(dataset: LatentDataset | PairDataset) -> HeldOut:
    """Turn a dataset into samples and pairs.  With several labels, ``all`` says whether every one of them is good."""
    if isinstance(dataset, PairDataset):
        return _held_out_pairs(dataset)

    def get(indices: list[int]) -> tuple[Tensor, Condition]:
        batch = dataset.get(indices)
        return batch.latents, batch.condition

    labels = dict(dataset.labels)
    if len(labels) > 1:
        labels[OVERALL] = torch.stack(list(labels.values())).amin(0)
    pairs = {name: metrics.pairs_within(values, dataset.prompts) for name, values in labels.items()}
    return HeldOut(get, dataset.prompts, labels, pairs, dataset.kinds(dataset.video))


def _held_out_pairs(dataset: PairDataset) -> HeldOut:
    """Turn n pairs into samples: sample i is side a of pair i, sample n + i its side b."""
    size = len(dataset)
    rows = torch.cat([dataset.a, dataset.b])
    number, prompts = metrics.group(dataset.prompts)

    def get(indices: list[int]) -> tuple[Tensor, Condition]:
        prompts = [dataset.prompts[index % size] for index in indices]
        condition = dataset.condition(prompts, rows[indices].tolist())
        return dataset.latents[rows[indices]].to(dataset.device), condition

    pairs = {}
    for name, preference in dataset.preference.items():
        labelled = (~preference.isnan()).nonzero().flatten()
        a_wins = preference[labelled] >= 0.5
        first = torch.where(a_wins, labelled, labelled + size)
        second = torch.where(a_wins, labelled + size, labelled)
        decided = (preference[labelled] != 0.5).long()
        pairs[name] = Pairs(first, second, decided, number[labelled], prompts)
    return HeldOut(get, dataset.prompts * 2, {}, pairs, dataset.kinds(rows))


def incomparable(dimensions: Iterable[str], data: HeldOut) -> dict[str, str]:
    """Say why dimensions have no accuracy on these samples; those that have one are left out."""
    reasons = {}
    for name in dimensions:
        if name not in data.pairs:
            reasons[name] = f"no held-out row says anything of it; they say {', '.join(data.pairs) or 'nothing'}"
        elif not len(data.pairs[name]):
            what = "no two held-out videos of one prompt have" if data.labels else "no held-out pair has"
            reasons[name] = f"{what} a label of it"
        elif not len(data.pairs[name].decided()):
            reasons[name] = f"all {len(data.pairs[name])} held-out pairs of it are ties"
    return reasons


def pixel_scorer(backbone: Backbone, reward: PixelReward | PublicReward) -> Scorer:
    """Make the fair pixel baseline: the base network's clean prediction, decoded, then scored."""

    def logits(latents: Tensor, sigma: Tensor, condition: Condition) -> Scores:
        return reward.logits(decoded_prediction(backbone, latents, sigma, condition), condition)

    return logits


def decoded_prediction(
    backbone: Backbone, latents: Float[Tensor, "b c t h w"], sigma: Tensor, condition: Condition
) -> Float[Tensor, "b 3 f H W"]:
    """Decode the base network's clean prediction from noisy latents."""
    with backbone.adapter(None):
        velocity = backbone.velocity(latents, sigma, condition)
    return backbone.decode(clean_prediction(latents, velocity, sigma))


Table = dict[tuple[str, Level], dict[str, Float[Tensor, "draws n"]]]
"""Logits by (scorer, level) and dimension."""


@torch.no_grad()
def score(
    scorers: Mapping[str, Scorer],
    data: HeldOut,
    at: Sequence[Level],
    *,
    noise_draws: int = 3,
    batch: int = 64,
    seed: int = 0,
    progress: Progress = iter,
) -> Table:
    """Score the same noised latents by every scorer at every level.

    Each sample has its own noise, since a policy's samples do; sigma is one for all samples of a prompt, and the draws
    of a bin are stratified over it.  Several processes share the batches out, and all get the whole.
    """
    size = len(data.prompts)
    table: Table = {(name, level): {} for name in scorers for level in at}
    jobs = [(draw, indices) for draw in range(noise_draws) for indices in data.batches(batch)]

    for draw, indices in progress(processes.share(jobs)):
        clean, condition = data.get(indices)
        noise = rng.normal(clean.shape[1:], seed, "evaluation/noise", draw, indices).to(clean)

        # Where in a bin sigma lies, in [0, 1): one draw a prompt, within this draw's share of the bin.
        draws = torch.cat([rng.uniform(seed, f"evaluation/{data.prompts[i]}", draw, [0]) for i in indices])
        fraction = (draw + draws) / noise_draws

        for level in at:
            sigma = (level.low + (level.high - level.low) * fraction).float().to(clean.device)
            noisy = add_noise(clean, noise, sigma)
            for name, scorer in scorers.items():
                columns = table[name, level]
                for dimension, values in with_overall(scorer(noisy, sigma, condition)).items():
                    column = columns.setdefault(dimension, torch.zeros(noise_draws, size))
                    column[draw, indices] = values.float().cpu()
    return _joined(processes.gather(table))


def _joined(parts: Sequence[Table]) -> Table:
    """Add up the tables of all processes, each of which has zeros where another one has scored."""
    whole = parts[0]
    for part in parts[1:]:
        for key, columns in part.items():
            for dimension, values in columns.items():
                whole[key][dimension] = whole[key].get(dimension, 0) + values
    return whole


def with_overall(logits: Scores) -> Scores:
    """Add ``all`` to two or more logits: log of the product of their probabilities."""
    if len(logits) < 2:
        return logits
    return logits | {OVERALL: total(logits, shape="logsigmoid")}


@dataclass(frozen=True)
class Row:
    """One scorer, dimension and level.  What needs labels of single videos is None where there are only pairs."""

    scorer: str
    dimension: str
    level: Level
    accuracy: Interval
    accuracy_ties: Interval | None
    threshold: float | None
    auc: Interval | None
    ece: Interval | None
    reliability: Reliability | None
    pairs: int
    ties: int


@dataclass(frozen=True)
class Measure:
    """One of the numbers of a row, and what a scorer that knows nothing has there."""

    title: str
    read: Callable[[Row], Interval | None]
    ignorant: float | None = None


MEASURES = {
    "accuracy": Measure("pairwise accuracy within a prompt", lambda row: row.accuracy, 0.5),
    "ties": Measure("the same, ties counted", lambda row: row.accuracy_ties),
    "auc": Measure("AUC over all samples", lambda row: row.auc, 0.5),
    "calibration": Measure("expected calibration error, less what chance adds", lambda row: row.ece),
}


def measured(rows: Sequence[Row]) -> dict[str, Measure]:
    """Select the measures that at least one of these rows has: pairs without labels have no AUC and no calibration."""
    return {name: measure for name, measure in MEASURES.items() if any(measure.read(row) for row in rows)}


def evaluate(
    scorers: Mapping[str, Scorer],
    data: HeldOut,
    at: Sequence[Level],
    *,
    train: HeldOut | None = None,
    noise_draws: int = 3,
    batch: int = 64,
    seed: int = 0,
    resamples: int = 1000,
    progress: Progress = iter,
) -> list[Row]:
    """Measure every scorer, at every level, for each dimension that it shares with the labels; a row for each.

    Intervals are over prompts.

    train: training samples, on which the margin that calls a tie is calibrated, per scorer, dimension and level;
    without them there is no accuracy with ties.
    """
    settings = dict(noise_draws=noise_draws, batch=batch, seed=seed, progress=progress)
    table = score(scorers, data, at, **settings)
    calibration = score(scorers, train, at, **settings) if train is not None else {}
    comparable = [name for name, pairs in data.pairs.items() if len(pairs.decided())]

    rows = []
    for (name, level), columns in table.items():
        for dimension in [dimension for dimension in columns if dimension in comparable]:
            threshold = None
            if train is not None:
                threshold = metrics.tie_threshold(calibration[name, level][dimension], train.pairs[dimension])
            rows.append(_row(name, dimension, level, columns[dimension], data, threshold, resamples))
    return rows


def _row(
    scorer: str, dimension: str, level: Level, logits: Tensor, data: HeldOut, threshold: float | None, resamples: int
) -> Row:
    """Measure one scorer at one level for one dimension.  logits: (draws, n)."""
    pairs = data.pairs[dimension]
    ties = auc = ece = reliability = None
    if threshold is not None:
        ties = metrics.pairwise_accuracy_ties(logits, pairs, threshold, resamples)

    # What needs labels of single videos; every draw counts.
    if dimension in data.labels:
        repeated = data.prompts * len(logits)
        labels = data.labels[dimension].repeat(len(logits))
        auc = metrics.auc(logits.flatten(), labels, repeated, resamples)
        probability = logits.exp() if dimension == OVERALL else logits.sigmoid()
        ece, reliability = metrics.calibration_error(probability.flatten(), labels, repeated, resamples)

    return Row(
        scorer,
        dimension,
        level,
        accuracy=metrics.pairwise_accuracy(logits, pairs, resamples),
        accuracy_ties=ties,
        threshold=threshold,
        auc=auc,
        ece=ece,
        reliability=reliability,
        pairs=len(pairs.decided()),
        ties=len(pairs) - len(pairs.decided()),
    )


def accuracy_by_bin(
    rows: Sequence[Row], scorer: str, read: Callable[[Interval], float] = lambda interval: interval.value
) -> dict[str, dict[str, float]]:
    """Collect {dimension: {"0-0.2": accuracy}} for a saved reward's card."""
    card: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.scorer == scorer and row.level.kind == "bin":
            card.setdefault(row.dimension, {})[row.level.label] = round(read(row.accuracy), 4)
    return card


def measured_card(rows: Sequence[Row], scorer: str) -> dict[str, Any]:
    """Collect what a reward's card has of one scorer's rows: accuracies, their lower ends, and pairs."""
    return {
        "accuracy": accuracy_by_bin(rows, scorer),
        "accuracy_low": accuracy_by_bin(rows, scorer, lambda interval: interval.low),
        "pairs": {row.dimension: row.pairs for row in rows if row.scorer == scorer},
    }


def save_rows(path: Path, rows: Sequence[Row], **facts: object) -> None:
    """Write JSON: ``facts`` (split, domain, command, ...) and the rows."""
    text = json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def results_of(run: Path, manifest: Path) -> Path:
    """Name the file for the measurement on these clips: beside that of other clips, in place of their own.

    It is called after the folder of the manifest, and after the manifest unless that is called manifest.jsonl.
    """
    clips = manifest.resolve()
    name = clips.parent.name if clips.stem == "manifest" else f"{clips.parent.name}-{clips.stem}"
    for number in count(1):
        path = run / (f"reward_eval-{name}.json" if number == 1 else f"reward_eval-{name}-{number}.json")
        try:
            measured_on = json.loads(path.read_text(encoding="utf-8")).get("clips")
        except (OSError, ValueError, AttributeError):  # nothing, or nothing that could be lost
            return path
        if measured_on is None or Path(measured_on).resolve() == clips:
            return path
    raise AssertionError


def load_rows(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Read the facts and the rows that ``save_rows`` wrote; none where a crash has damaged them."""
    return read_rows(whole_json(path, "rows") or {"rows": []})


def read_rows(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[Row]]:
    """Turn the content of such a file into facts and rows."""
    facts = dict(content)
    return facts, [_read_row(row) for row in facts.pop("rows")]


def _read_row(fields: dict[str, Any]) -> Row:
    """Make a row of its JSON."""
    kinds: dict[str, type] = {"level": Level, "reliability": Reliability}
    kinds |= dict.fromkeys(("accuracy", "accuracy_ties", "auc", "ece"), Interval)

    values = dict(fields)
    for name, kind in kinds.items():
        if values[name] is not None:
            values[name] = kind(**values[name])
    return Row(**values)
