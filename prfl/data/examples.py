"""What a reward is trained on: labelled videos, or pairs of videos of one prompt, and how a batch of them is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prfl.backbone.condition import Condition
from prfl.data.dataset import LatentDataset, PairDataset, preference_between
from prfl.utils.errors import PrflError
from prfl.utils.order import shuffled, shuffled_alike
from prfl.utils.text import did_you_mean

Loss = Literal["bce", "bradley_terry", "rao_kupper", "thurstone"]
"""``bce`` learns from labels of single videos, the others from which of two videos is better."""


@dataclass(frozen=True)
class Examples:
    """What a reward is trained on, one entry per labelled video (``bce``) or per pair of videos of one prompt.

    sides: rows of the data set's latents: one (m,) tensor for videos, two (a, b) for pairs.
    targets: for each dimension (m,): a label in [0, 1], or 1 (a is better), 0 (b is better), 0.5 (tie); nan if missing.
    """

    sides: tuple[Int[Tensor, " m"], ...]
    targets: dict[str, Float[Tensor, " m"]]
    prompts: list[str]
    kinds: tuple[int, ...] = ()  # the number of each example's latent shape; empty where there is only one shape

    @cached_property
    def labelled(self) -> dict[str, float]:
        """Share of the examples that have a target, by dimension."""
        return {name: float((~values.isnan()).double().mean()) for name, values in self.targets.items()}

    def __len__(self) -> int:
        return len(self.prompts)


def examples(dataset: LatentDataset | PairDataset, loss: Loss, dimensions: Sequence[str]) -> Examples:
    """Return all of the dataset's examples for a loss that have a target in one of ``dimensions``.

    For a pair loss, labelled videos are paired within each prompt.  Only pairs whose labels differ in some dimension
    are used; ``rao_kupper``, which models ties, uses pairs with equal labels as well.
    Raises PrflError when a dimension is not in the data, or when its data cannot tell good from bad: there is no label,
    or (``bce``) all labels are equal, or (pairs) no pair has a better side.
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

    # Keep the examples with a target in any dimension; for most pair losses, a tie is not a target.
    stacked = torch.stack([targets[name] for name in dimensions])
    useful = ~stacked.isnan()
    if loss != "bce" and loss != "rao_kupper":
        useful &= stacked != 0.5
    keep = useful.any(0).nonzero().flatten()
    return Examples(
        tuple(side[keep] for side in sides),
        {name: targets[name][keep] for name in dimensions},
        [prompts[row] for row in keep.tolist()],
        tuple(dataset.kinds(sides[0][keep])),
    )


def check_two_kinds(name: str, target: Tensor, loss: Loss) -> None:
    """Raise PrflError when these targets cannot teach a scorer anything; see ``examples``."""
    labels = target[~target.isnan()]
    if loss == "bce":
        enough, kind = bool((labels != labels[:1]).any()), f"labels are all {float(labels[0]):g}" if len(labels) else ""
        fix = "label both good and bad videos"
    else:
        enough, kind = bool((labels != 0.5).any()), f"{len(labels)} pairs are all ties" if len(labels) else ""
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
    """Return all pairs a < b of rows with the same prompt."""
    members: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(row)
    pairs = [(a, b) for rows in members.values() for i, a in enumerate(rows) for b in rows[i + 1 :]]
    a, b = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return a, b


@dataclass(frozen=True)
class Drawn:
    """A batch of b examples.

    Latents and condition have n = b entries for videos, and n = 2 b for pairs: the sides a of all pairs, then b.
    """

    rows: list[int]
    latents: Float[Tensor, "n c t h w"]
    condition: Condition
    targets: dict[str, Float[Tensor, " b"]]
    prompts: list[str]

    @property
    def sides(self) -> int:
        return len(self.rows) // len(self.prompts)


def draw_examples(dataset: LatentDataset | PairDataset, pool: Examples, seed: int, indices: Sequence[int]) -> Drawn:
    """Take the examples of these sample indices.  Each epoch goes through the whole pool in a new order."""
    if pool.kinds:
        chosen = shuffled_alike(indices, pool.kinds, dataset.batch, seed, "preference")
    else:
        chosen = shuffled(indices, len(pool), seed, "preference")
    rows = torch.cat([side[chosen] for side in pool.sides])
    prompts = [pool.prompts[example] for example in chosen]
    return Drawn(
        rows.tolist(),
        dataset.latents[rows].to(dataset.device, torch.float32),
        dataset.condition(prompts * len(pool.sides), rows.tolist()),
        {name: values[chosen] for name, values in pool.targets.items()},
        prompts,
    )
