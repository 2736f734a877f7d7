"""How many answers it saves to ask first where heads are unsure, for the same accuracy, on the shapes world.

    python bench/study_labels.py [--seeds 3] [--cache runs/cache]       (15 minutes of one core)

1. The base's samples: 18 of each of 88 training and 12 of each of 24 validation prompts.  The oracle answers in a
   person's place: the video with more of five attributes right is better, as many right are a tie.
2. For each seed, heads are trained on 60 pairs that were drawn at random.  Then they are asked for more, twice as many
   in all each time, of all pairs of a prompt: at random; those that the last head is least sure of (``unsure``); or
   those of which three heads, of other first weights, differ most (``differ``); both by the page's own code.
3. Every head ranks the validation pairs that are no ties, at sigma 0, 0.25 and 0.5.

The blocks under the head are frozen, so their features are computed once: a training of the head alone takes seconds.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import studies
from prfl.backbone import Backbone
from prfl.config import Config, load_config
from prfl.data.dataset import LatentDataset
from prfl.factory.backbone import build_backbone
from prfl.factory.clips import build_manifest
from prfl.factory.data import build_dataset, encode_manifest
from prfl.labels.pairs import Pair
from prfl.labels.uncertain import differ, unsure
from prfl.reward import losses
from prfl.reward.head import RewardHead
from prfl.rollout.flow import add_noise
from prfl.utils import rng

CONFIG = "configs/tiny/reward.yaml"
SAMPLES = ["data.generator.per_prompt=18", "data.generator.held_out_per_prompt=12", "data.generator.other_captions=0"]
SIGMAS = (0.0, 0.25, 0.5)
ASKED = (60, 120, 240, 480)  # answers in all, of either way to choose
LONGER = (*ASKED, 960, 1920)  # of the random way, to read the chosen one's accuracy off
HEADS = 3  # that have to agree
WAYS = {"uncertain": 1, "disagreement": HEADS}  # beside random: how many heads are asked
STEPS, BATCH, RATE = 200, 32, 1e-3


@dataclass(frozen=True)
class Pool:
    """Samples with their features, (n, sigmas, tokens, width), and every pair of one prompt: rows, and the answer."""

    features: Tensor
    pairs: list[tuple[int, int]]
    answers: Tensor  # 1: the first is better, 0: the second, 0.5: a tie

    @property
    def decided(self) -> Tensor:
        return self.answers != 0.5


@torch.no_grad()
def pool(config: Config, model: Backbone, path: Path, split: str) -> Pool:
    data = build_dataset(config, model, path, split)
    assert isinstance(data, LatentDataset)
    rows = [int(torch.nonzero(data.video == video)[0]) for video in data.video.unique()]  # with its own prompt
    features = []
    for start in range(0, len(rows), 64):
        batch = data.get(rows[start : start + 64])
        noise = rng.normal(batch.latents.shape[1:], 0, "study", 0, rows[start : start + 64]).to(batch.latents)
        at_levels = []
        for sigma in SIGMAS:
            level = torch.full((len(noise),), sigma)
            noisy = add_noise(batch.latents, noise, level)
            at_levels += model.features(noisy, level, batch.condition, [3])
        features.append(torch.stack(at_levels, 1))

    right = torch.stack([values[rows] for values in data.labels.values()]).sum(0)
    prompts = [data.prompts[row] for row in rows]
    pairs = [(a, b) for a in range(len(rows)) for b in range(a + 1, len(rows)) if prompts[a] == prompts[b]]
    first, second = torch.tensor(pairs).T
    return Pool(torch.cat(features), pairs, ((right[first] - right[second]).sign() + 1) / 2)


def trained(data: Pool, asked: Sequence[int], seed: int) -> RewardHead:
    """A head that was trained on the answers to these pairs, by the loss that knows ties."""
    torch.manual_seed(seed)
    head = RewardHead(data.features.shape[-1], ["better"])
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.01)
    draws = torch.Generator().manual_seed(seed)
    pairs, answers = torch.tensor(data.pairs)[asked], data.answers[asked]
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / STEPS)) / 2
        chosen = torch.randint(len(pairs), (BATCH,), generator=draws)
        levels = torch.randint(len(SIGMAS), (BATCH,), generator=draws).repeat(2)
        logits = head([data.features[pairs[chosen].T.flatten(), levels]], torch.tensor(SIGMAS)[levels])[:, 0]
        loss = losses.rao_kupper(logits[:BATCH], logits[BATCH:], answers[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


@torch.no_grad()
def scores(head: RewardHead, data: Pool) -> Tensor:
    """Scores of every sample, by noise level: (sigmas, n)."""
    levels = torch.tensor(SIGMAS).expand(len(data.features), -1)
    each = [head([data.features[:, at]], levels[:, at])[:, 0] for at in range(len(SIGMAS))]
    return torch.stack(each)


def accuracy(head: RewardHead, data: Pool) -> float:
    first, second = torch.tensor(data.pairs)[data.decided].T
    ranked = scores(head, data)
    return float(((ranked[:, first] > ranked[:, second]) == (data.answers[data.decided] > 0.5)).double().mean())


def asked_first(heads: Sequence[RewardHead], data: Pool, open_pairs: Sequence[int], count: int) -> list[int]:
    """The pairs that the page would ask first: that one head is least sure of, or on which several differ most."""
    pairs = [Pair("", *map(str, data.pairs[number])) for number in open_pairs]
    by_head = [clean_scores(head, data) for head in heads]
    first = differ(pairs, by_head, ["better"]) if len(heads) > 1 else unsure(pairs, by_head[0], ["better"])
    ordered = sorted(zip(open_pairs, pairs, strict=True), key=lambda each: -first[f"{each[1].a} {each[1].b}"])
    return [number for number, _ in ordered[:count]]


def clean_scores(head: RewardHead, data: Pool) -> dict[str, dict[str, float]]:
    """The scores of the clean videos, by their rows, in standard deviations."""
    clean = scores(head, data)[0]
    clean = (clean - clean.mean()) / clean.std()
    return {str(row): {"better": float(score)} for row, score in enumerate(clean)}


def one_seed(train: Pool, held: Pool, seed: int) -> dict[str, dict[int, dict[str, float]]]:
    """By the way to choose and the number of answers: the accuracy, and the share of ties among the answers."""
    order = list(range(len(train.pairs)))
    random.Random(f"study of labels {seed}").shuffle(order)
    measured: dict[str, dict[int, dict[str, float]]] = {way: {} for way in ("random", *WAYS)}

    def measure(way: str, asked: list[int], heads: int = 1) -> list[RewardHead]:
        several = [trained(train, asked, seed + 1000 * number) for number in range(heads)]
        ties = float((~train.decided[asked]).double().mean())
        measured[way][len(asked)] = {"accuracy": round(accuracy(several[0], held), 4), "ties": round(ties, 4)}
        print(seed, way, len(asked), measured[way][len(asked)], flush=True)
        return several

    first = measure("random", order[: ASKED[0]], HEADS)
    for way, heads in WAYS.items():
        measured[way][ASKED[0]] = measured["random"][ASKED[0]]
        asked, last = order[: ASKED[0]], first
        for count in ASKED[1:]:
            open_pairs = sorted(set(order) - set(asked))
            asked = asked + asked_first(last[:heads], train, open_pairs, count - len(asked))
            last = measure(way, asked, heads if count < ASKED[-1] else 1)
    for count in LONGER[1:]:
        measure("random", order[:count])
    return measured


def same_accuracy(curve: dict[int, float], accuracy: float) -> float:
    """How many random answers first give this accuracy, on a line between the counts' logarithms.

    Not below the fewest nor above the most that were measured: a figure at an end is a bound.
    """
    counts = sorted(curve)
    if accuracy <= curve[counts[0]]:
        return counts[0]
    for low, high in zip(counts, counts[1:], strict=False):
        if curve[low] < accuracy <= curve[high]:
            return low * (high / low) ** ((accuracy - curve[low]) / (curve[high] - curve[low]))
    return counts[-1]


def rows_of(by_seed: Sequence[dict[str, dict[int, dict[str, float]]]]) -> list[dict]:
    """A row for each number of answers; the saving is read off each seed's random curve, and off their mean."""
    curves = [{count: of["random"][count]["accuracy"] for count in LONGER} for of in by_seed]
    mean = {count: sum(curve[count] for curve in curves) / len(curves) for count in LONGER}
    rows = []
    for count in LONGER:
        row: dict = {"answers": count}
        for way in ("random", *WAYS):
            of_way = [of[way][count] for of in by_seed if count in of[way]]
            if of_way:
                row[way] = {key: [each[key] for each in of_way] for key in ("accuracy", "ties")}
        for way in WAYS:
            if way in row and count > ASKED[0]:
                reached = row[way]["accuracy"]
                row[way]["random answers for the same"] = round(same_accuracy(mean, sum(reached) / len(reached)))
                row[way]["the same, by seed"] = [
                    round(same_accuracy(*each)) for each in zip(curves, reached, strict=True)
                ]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/labels.json"))
    parser.add_argument("--seeds", type=int, default=len(studies.SEEDS), help="how many")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where the samples are, or go")
    options = parser.parse_args()
    config = load_config(CONFIG, [*SAMPLES, f"data.cache={options.cache}"])
    model = build_backbone(config)
    path = build_manifest(config, model, iter)
    encode_manifest(config, model, path)
    train, held = (pool(config, model, path, split) for split in ("train", "validation"))
    by_seed = [one_seed(train, held, seed) for seed in range(options.seeds)]
    result = {
        "seeds": list(range(options.seeds)),
        "pairs": {"train": len(train.pairs), "validation, no ties": int(held.decided.sum())},
        "ties": round(float((~train.decided).double().mean()), 4),
        "rows": rows_of(by_seed),
    }
    studies.write(options.out, result)


if __name__ == "__main__":
    main()
