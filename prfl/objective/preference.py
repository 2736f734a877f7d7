"""Training a reward from labels or preferences: the first stage, before a policy follows the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prfl.backbone import Backbone
from prfl.backbone.condition import Condition
from prfl.data.dataset import LatentDataset, PairDataset, preference_between
from prfl.objective.base import Mean
from prfl.reward import losses
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelReward
from prfl.reward.scores import Scores
from prfl.rollout.flow import add_noise, shift_sigmas
from prfl.utils import rng
from prfl.utils.errors import PrflError
from prfl.utils.order import shuffled
from prfl.utils.text import did_you_mean
from prfl.utils.timing import Clock

Loss = Literal["bce", "bradley_terry", "rao_kupper", "thurstone"]
SigmaSampling = Literal["uniform", "shifted", "mixture"]


def draw_sigma(
    sampling: SigmaSampling, shift: float, seed: int, step: int, indices: Sequence[int]
) -> Float[Tensor, " b"]:
    """Noise levels in [0, 1): even, as a sampler with this shift spreads them, or (``mixture``) half of each."""
    u = rng.uniform(seed, "preference/sigma", step, indices)
    shifted = shift_sigmas(u, shift)
    if sampling == "mixture":
        even = rng.uniform(seed, "preference/sigma_kind", step, indices) < 0.5
        return torch.where(even, u, shifted).float()
    return (shifted if sampling == "shifted" else u).float()


@dataclass(frozen=True)
class Examples:
    """What a reward is trained on, one entry per labelled video (``bce``) or per pair of videos of one prompt.

    sides: rows of the dataset's latents, (m,) for videos, twice that for pairs (a, b).
    targets: per dimension (m,): a label in [0, 1], or 1 (a is better), 0 (b), 0.5 (tie); nan where missing.
    """

    sides: tuple[Int[Tensor, " m"], ...]
    targets: dict[str, Float[Tensor, " m"]]
    prompts: list[str]

    @cached_property
    def known(self) -> dict[str, float]:
        """Share of the examples that have a target, by dimension."""
        return {name: float((~values.isnan()).double().mean()) for name, values in self.targets.items()}

    def __len__(self) -> int:
        return len(self.prompts)


def examples(dataset: LatentDataset | PairDataset, loss: Loss, dimensions: Sequence[str]) -> Examples:
    """All of the dataset's examples for a loss that have a target in one of ``dimensions``.

    From labelled videos, a pair loss makes every pair within a prompt: pairs whose labels differ in some dimension,
    and for ``rao_kupper``, which has an outcome for ties, the equal ones as well.
    Raises PrflError when a dimension is not in the data, or when nothing in them tells good from bad in it: no label
    at all, or (``bce``) labels that are all alike, or (pairs) no pair of which one side is better.
    """
    sides, targets, prompts = _all_examples(dataset, loss)
    for name in dimensions:
        if name not in targets:
            raise PrflError(
                f"the data have no label '{name}'",
                where="reward.head.dimensions",
                fix=did_you_mean(name, list(targets)),
            )
        check_two_kinds(name, targets[name], loss)
    stacked = torch.stack([targets[name] for name in dimensions])
    useful = ~stacked.isnan()
    if loss != "bce" and loss != "rao_kupper":
        useful &= stacked != 0.5
    keep = useful.any(0).nonzero().flatten()
    return Examples(
        tuple(side[keep] for side in sides),
        {name: targets[name][keep] for name in dimensions},
        [prompts[row] for row in keep.tolist()],
    )


def check_two_kinds(name: str, target: Tensor, loss: Loss) -> None:
    """Raise PrflError when these targets cannot teach a scorer anything; see ``examples``."""
    known = target[~target.isnan()]
    if loss == "bce":
        enough, kind = bool((known != known[:1]).any()), f"labels are all {float(known[0]):g}" if len(known) else ""
        fix = "label both good and bad videos"
    else:
        enough, kind = bool((known != 0.5).any()), f"{len(known)} pairs are all ties" if len(known) else ""
        fix = "label the videos; a pair loss needs two or more videos of a prompt whose labels differ"
    if not enough:
        what = f"nothing in the data can train '{name}' with the loss {loss}: {kind or 'none of its labels is there'}"
        raise PrflError(what, fix=f"{fix}, or leave '{name}' out of reward.head.dimensions")


def _all_examples(
    dataset: LatentDataset | PairDataset, loss: Loss
) -> tuple[tuple[Tensor, ...], dict[str, Tensor], list[str]]:
    if isinstance(dataset, PairDataset):
        if loss == "bce":
            raise PrflError(
                "the manifest has pairs, and bce needs labels", where="objective.loss", fix="take a pair loss"
            )
        return (dataset.a, dataset.b), dataset.preference, dataset.prompts
    if loss == "bce":
        return (dataset.video,), dataset.labels, dataset.prompts
    a, b = _pairs_within_prompts(dataset.prompts)
    preference = {name: preference_between(labels[a], labels[b]) for name, labels in dataset.labels.items()}
    return (dataset.video[a], dataset.video[b]), preference, [dataset.prompts[row] for row in a.tolist()]


def _pairs_within_prompts(prompts: Sequence[str]) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
    """All pairs a < b of rows with the same prompt."""
    members: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(row)
    pairs = [(a, b) for rows in members.values() for i, a in enumerate(rows) for b in rows[i + 1 :]]
    a, b = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return a, b


def reward_loss(
    loss: Loss,
    logits: Scores,
    targets: dict[str, Tensor],
    sigma: Float[Tensor, " examples"],
    eta: float,
    known: dict[str, float],
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Mean over examples and dimensions, and metrics.

    logits: (examples,) for ``bce``, (2 examples,) for pairs: all a, then all b.  sigma: one for both sides.
    known: share of all examples that have a target, by dimension.  A dimension's mean is over what the batch would
    have at that share, not over what it happens to have: so it is a sum over examples, however a batch is split.
    """
    terms, metrics = [], {}
    for name, logit in logits.items():
        target = targets[name].to(logit)
        if target.isnan().all():
            continue
        if loss == "bce":
            score, term = logit, losses.bce(logit, target)
        else:
            a, b = logit.chunk(2)
            score, term = a - b, pair_loss(loss, a, b, target, sigma, eta)
        terms.append(term * (float((~target.isnan()).double().mean()) / known[name]))
        decided = (target - 0.5).abs() > 0  # neither missing nor a tie
        if decided.any():
            right = ((score > 0) == (target > 0.5))[decided].double().mean()
            metrics[f"accuracy/{name}"] = Mean(float(right), int(decided.sum()))
    mean = torch.stack(terms).sum() / len(logits)
    return mean, {"loss": float(mean.detach()), **metrics}


def pair_loss(loss: Loss, a: Tensor, b: Tensor, target: Tensor, sigma: Tensor, eta: float) -> Float[Tensor, ""]:
    if loss == "rao_kupper":
        return losses.rao_kupper(a, b, target, eta)
    if loss == "thurstone":
        return losses.thurstone(a, b, target, sigma.to(a))
    return losses.bradley_terry(a, b, target)


@dataclass(frozen=True)
class Drawn:
    """A batch of b examples; latents and condition have n = b entries, or n = 2 b: all a, then all b."""

    rows: list[int]
    latents: Float[Tensor, "n c t h w"]
    condition: Condition
    targets: dict[str, Float[Tensor, " b"]]
    prompts: list[str]

    @property
    def sides(self) -> int:
        return len(self.rows) // len(self.prompts)


def draw_examples(dataset: LatentDataset | PairDataset, among: Examples, seed: int, indices: Sequence[int]) -> Drawn:
    chosen = shuffled(indices, len(among), seed, "preference")
    rows = torch.cat([side[chosen] for side in among.sides])
    prompts = [among.prompts[example] for example in chosen]
    return Drawn(
        rows.tolist(),
        dataset.latents[rows].to(dataset.device, torch.float32),
        dataset.condition(prompts * len(among.sides)),
        {name: values[chosen] for name, values in among.targets.items()},
        prompts,
    )


@dataclass
class Preference:
    """Train a ``LatentReward`` on noised latents; both sides of a pair get the same sigma, noise and dropout.

    An index stands for one labelled video (``bce``) or one pair (other losses).  With a frozen backbone only the head
    keeps a graph; with the reward's own adapter its blocks are trained too.
    sigma_sampling, shift: see ``draw_sigma``.  eta: of ``rao_kupper``.
    """

    reward: LatentReward
    dataset: LatentDataset | PairDataset
    seed: int
    loss: Loss = "bce"
    sigma_sampling: SigmaSampling = "uniform"
    shift: float = 1.0
    eta: float = 5.0

    def __post_init__(self) -> None:
        self.examples = examples(self.dataset, self.loss, self.reward.dimensions)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.reward.parameters()

    def draw(self, step: int, indices: Sequence[int]) -> tuple[Drawn, Tensor, Tensor]:
        """The batch, sigma (b,), noise (b, c, t, h, w)."""
        batch = draw_examples(self.dataset, self.examples, self.seed, indices)
        sigma = draw_sigma(self.sigma_sampling, self.shift, self.seed, step, indices)
        noise = rng.normal(batch.latents.shape[1:], self.seed, "preference/noise", step, indices)
        return batch, sigma.to(batch.latents), noise.to(batch.latents)

    def accumulate(self, step: int, indices: Sequence[int]) -> dict[str, float]:
        """See ``Objective``."""
        clock = Clock(self.reward.backbone.device)
        with clock("data"):
            batch, sigma, noise = self.draw(step, indices)
        each = sigma.repeat(batch.sides)
        noisy = add_noise(batch.latents, noise.repeat(batch.sides, 1, 1, 1, 1), each)
        dropout = rng.seeds(self.seed, "dropout/preference", step, indices).to(sigma.device).repeat(batch.sides)
        with self.reward.selected(), self.reward.dropping(dropout):  # until backward is over: checkpointing recomputes
            with clock("reward"):
                logits = self.reward.logits(noisy, each, batch.condition)
                known = self.examples.known
                loss, metrics = reward_loss(self.loss, logits, batch.targets, sigma, self.eta, known)
            with clock("backward"):
                loss.backward()
        return metrics | clock.metrics()

    def describe(self, step: int, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The batch as it was drawn, for a person who wants to know why it failed."""
        batch, sigma, noise = self.draw(step, indices)
        tensors = {"latents": batch.latents, "sigma": sigma, "noise": noise}
        return tensors | {f"target/{name}": t for name, t in batch.targets.items()}, {"prompts": batch.prompts}


@dataclass
class PixelPreference:
    """Train a ``PixelReward`` on decoded clean latents: unclamped, as it will see the policy's videos.

    frames: how many frames of each clip it sees, another subset each step (None: all).
    keep_decoded: keep every decoded clip in host memory as float16, so that each is decoded only once.
    """

    reward: PixelReward
    dataset: LatentDataset | PairDataset
    backbone: Backbone
    seed: int
    loss: Loss = "bce"
    frames: int | None = None
    eta: float = 5.0
    keep_decoded: bool = False
    decoded: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.examples = examples(self.dataset, self.loss, self.reward.dimensions)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.reward.parameters()

    def accumulate(self, step: int, indices: Sequence[int]) -> dict[str, float]:
        """See ``Objective``; the subset of frames depends on the step only."""
        clock = Clock(self.backbone.device)
        with clock("data"):
            batch = draw_examples(self.dataset, self.examples, self.seed, indices)
            pixels = self.pixels(batch)
        count = pixels.shape[2]
        shown = torch.arange(count)
        if self.frames is not None and self.frames < count:
            order = torch.randperm(count, generator=rng.generator(self.seed, "preference/frames", step))
            shown = order[: self.frames].sort().values
        with clock("reward"):
            times = shown / max(count - 1, 1)
            logits = self.reward.logits(pixels[:, :, shown.to(pixels.device)], batch.condition, times)
            sigma = torch.zeros(len(indices), device=pixels.device)
            loss, metrics = reward_loss(self.loss, logits, batch.targets, sigma, self.eta, self.examples.known)
        with clock("backward"):
            loss.backward()
        return metrics | clock.metrics()

    @torch.no_grad()
    def pixels(self, batch: Drawn) -> Float[Tensor, "n 3 f H W"]:
        """Decoded clips, through float16 whether they are kept or not, so that keeping them changes nothing."""
        fresh = {row: at for at, row in enumerate(batch.rows) if row not in self.decoded}
        clips = {row: self.decoded[row] for row in batch.rows if row not in fresh}
        if fresh:
            made = self.backbone.decode(batch.latents[list(fresh.values())]).half().cpu()
            clips |= dict(zip(fresh, made, strict=True))
        if self.keep_decoded:
            self.decoded |= clips
        return torch.stack([clips[row] for row in batch.rows]).to(batch.latents)

    def describe(self, step: int, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The batch as it was drawn, for a person who wants to know why it failed."""
        batch = draw_examples(self.dataset, self.examples, self.seed, indices)
        tensors = {"latents": batch.latents} | {f"target/{name}": t for name, t in batch.targets.items()}
        return tensors, {"prompts": batch.prompts}
