"""How well reward heads rank the base's samples, by noise level: frozen, adapter, mean pooling, pixel; and a ceiling.

    prfl train configs/tiny/second.yaml          first: the generator whose samples are out of domain
    python bench/study_reward.py [--out bench/results/reward.json]

1. Each reward is trained with three seeds from the same labels: 6,336 samples of 88 training prompts, each judged for
   its own caption and for one other that differs in one attribute.
2. Fresh samples of the 32 test prompts, of the base and of the second model (other VAE, other seed, other width;
   written as video, read and encoded again), are labelled by the oracle; every reward ranks them at every noise level.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from bench import studies
from bench.harness import study_tables
from prfl.backbone import Condition
from prfl.config import load_config
from prfl.evaluation import reward_eval
from prfl.factory.backbone import build_backbone
from prfl.factory.data import build_dataset, encode_manifest
from prfl.factory.evaluation import build_latents_scorer
from prfl.factory.reward import TrainableReward, load_reward
from prfl.reward.latent import LatentReward
from prfl.reward.scores import Scores
from prfl.rollout.sampling import SamplingSettings, decode_all, sample
from prfl.toy import clips as shapes
from prfl.toy import recipe
from prfl.toy.renderer import split_prompts

RUNS = Path("runs/study-reward")
PER_PROMPT = 12  # test samples: 384 of 32 prompts
CONFIG = "configs/tiny/reward.yaml"
WHOLE = "{rank: 128, alpha: 128, targets: [to_q, to_k, to_v, to_out.0, ffn.net.0.proj, ffn.net.2]}"
HEADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "frozen": (CONFIG, ()),
    "adapter": (CONFIG, ("reward.head.adapter={rank: 16, alpha: 16}",)),
    "mean pooling": (CONFIG, ("reward.head.pooling=mean",)),
    "pixel": ("configs/tiny/pixel_reward.yaml", ()),
}
LABELS = [
    "data.generator.per_prompt=72", "data.generator.held_out_per_prompt=24", "data.generator.other_captions=1",
    "training.steps=1600", "training.save_every=400",
    "evaluation.every=0",
]  # fmt: skip
# As wide an adapter as the layers are, so the blocks can become anything; ten times the labels.
CEILING = (
    CONFIG, (f"reward.head.adapter={WHOLE}", "data.generator.per_prompt=720",
             "data.generator.other_captions=1", "training.steps=6000", "training.learning_rate=5e-4"),
)  # fmt: skip
DOMAINS = ("base", "second")


def trained(name: str, seed: int) -> Path:
    config, overrides = HEADS[name]
    folder = RUNS / f"{name.replace(' ', '-')}-{seed}"
    return studies.train(folder, config, [*LABELS, *overrides, f"seed={seed}"])


def ceiling() -> Path:
    config, overrides = CEILING
    return studies.train(RUNS / "ceiling-0", config, list(overrides))


# ------------------------------------------------------------------------------- one process each, called by the study


def second_model() -> Path:
    """Put the second generator into one pipeline folder: its transformer comes from its training run."""
    folder = RUNS / "second-model"
    if not folder.exists():
        untrained_folder = recipe.untrained_folder(
            Path("runs/cache/shapes-second-untrained"), recipe.RECIPES["shapes-second-untrained"]
        )
        shutil.copytree(untrained_folder, folder, ignore=shutil.ignore_patterns("transformer"))
        shutil.copytree("runs/tiny-second/transformer", folder / "transformer")
    return folder


def draw(domain: str) -> None:
    """Labelled videos of the test prompts, drawn by the base or by the second model."""
    folder = None if domain == "base" else second_model()
    config = load_config(CONFIG, [] if folder is None else [f"backbone.model={folder}"])
    model = build_backbone(config)
    settings = SamplingSettings(frames=17, height=32, width=32, steps=20, batch=64, seed=1)
    shapes.labelled(
        RUNS / f"test-{domain}",
        split_prompts(),
        {"test": PER_PROMPT},
        lambda prompts, indices: decode_all(model, sample(model, prompts, indices, settings), 64),
    )


def measure(domain: str, heads: list[str], out: Path) -> None:
    """Measure the named rewards at every noise level on the domain's videos."""
    config = load_config(CONFIG)
    model = build_backbone(config)
    path = RUNS / f"test-{domain}/manifest.jsonl"
    encode_manifest(config, model, path)
    data = build_dataset(config, model, path, "test")
    assert data is not None
    rewards = {name: load_reward(RUNS / name / "reward", model, f"reward-{n}") for n, name in enumerate(heads)}
    decoded: dict[str, torch.Tensor] = {}  # the last batch, for all pixel rewards: decoding is most of their time

    def scorer(reward: TrainableReward) -> reward_eval.Scorer:
        if isinstance(reward, LatentReward):
            return build_latents_scorer(reward, model)

        def score(latents: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> Scores:
            if decoded.get("of") is not latents:
                decoded["of"] = latents
                decoded["pixels"] = reward_eval.decoded_prediction(model, latents, sigma, condition)
            return reward.logits(decoded["pixels"], condition)

        return score

    scorers = {name: scorer(reward) for name, reward in rewards.items()}
    rows = reward_eval.evaluate(scorers, reward_eval.held_out(data), reward_eval.levels(), noise_draws=1)
    reward_eval.save_rows(out, rows)


# ------------------------------------------------------------------------------------------------------------ the study


def study(heads: list[str], with_ceiling: bool) -> dict:
    with studies.pool() as pool:
        trained(heads[0], 0)  # alone: it draws the labels that the others share
        jobs = {(name, seed): pool.submit(trained, name, seed) for seed in studies.SEEDS for name in heads}
        folders = {key: job.result().name for key, job in jobs.items()}
        if with_ceiling:
            folders["ceiling", 0] = ceiling().name
        for domain in DOMAINS:
            if not (RUNS / f"test-{domain}/manifest.jsonl").exists():
                studies.run([__file__, "--draw", domain], RUNS / f"draw-{domain}.txt")

        def measured(domain: str, name: str) -> dict:
            heads = [folder for (n, _), folder in folders.items() if n == name]
            out = RUNS / f"{domain}-{name.replace(' ', '-')}.json"
            if not out.exists():
                studies.run([__file__, "--measure", domain, str(out), *heads], RUNS / f"measure-{out.stem}.txt")
            return json.loads(out.read_text(encoding="utf-8"))

        names = list(dict.fromkeys(name for name, _ in folders))
        tables = {(d, name): pool.submit(measured, d, name) for d in DOMAINS for name in names}
        return {
            "labels": {
                "train videos": 88 * 72,
                "train": 2 * 88 * 72,
                "test": 32 * PER_PROMPT,
                "share all right": shares(),
            },
            "accuracy": [
                row for (domain, name), table in tables.items() for row in summary(domain, name, table.result()["rows"])
            ],
        }


def shares() -> dict[str, float]:
    """Return the share of each domain's test samples that have everything right."""
    by_domain = {}
    for domain in DOMAINS:
        rows = map(json.loads, (RUNS / f"test-{domain}/manifest.jsonl").read_text(encoding="utf-8").splitlines())
        right = [min(row["label"].values()) for row in rows]
        by_domain[domain] = sum(right) / len(right)
    return by_domain


def summary(domain: str, reward: str, rows: list[dict]) -> list[dict]:
    """Summarise by dimension and level: the mean over seeds, each seed, and the first seed's interval over prompts."""
    grouped: dict[tuple[str, str, float, float], list[dict]] = {}
    for row in rows:
        level = row["level"]
        grouped.setdefault((row["dimension"], level["kind"], level["low"], level["high"]), []).append(row)
    return [
        {
            "domain": domain, "reward": reward, "dimension": dimension, "level": kind, "sigma": [low, high],
            "accuracy": float(torch.tensor([row["accuracy"]["value"] for row in of_seeds]).mean()),
            "per seed": [row["accuracy"]["value"] for row in of_seeds],
            "interval of seed 0": [of_seeds[0]["accuracy"]["low"], of_seeds[0]["accuracy"]["high"]],
            "auc": of_seeds[0]["auc"]["value"], "calibration error": of_seeds[0]["ece"]["value"],
            "pairs": of_seeds[0]["pairs"],
        }
        for (dimension, kind, low, high), of_seeds in grouped.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/reward.json"))
    parser.add_argument("--ceiling", action="store_true", help="train it too: 80,640 labels, hours on two cores")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="only these (default: all)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of a results file")
    parser.add_argument("--draw", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)

    options = parser.parse_args()
    if options.draw:
        draw(options.draw)
    elif options.table:
        print(study_tables.of_files("heads", options.table))
    elif options.measure:
        domain, out, *heads = options.measure
        measure(domain, heads, Path(out))
    else:
        studies.write(options.out, study(options.heads, options.ceiling))


if __name__ == "__main__":
    main()
