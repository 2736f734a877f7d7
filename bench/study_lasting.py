"""What keeps a long run's gain?  PRFL for many more steps than it needs, and what is said to help, one at a time.

    python bench/study_reward.py        first: it trains the rewards
    python bench/study_lasting.py [--steps 200] [--guards plain ...] [--add] [--out ...]

Every run starts from the base and goes on at a constant rate, as people do who do not know when to stop: PRFL with
stride 2 and four gradients a rollout, and an SFT step before every fourth step only.  A guard is one change of it.
"refreshed" follows a reward that was trained on the base's samples and on those of the plain run's last policy (seed
0's for all).  Rounds on validation prompts are the curve; test prompts are drawn at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import studies, study_reward
from bench import study_methods as methods
from bench import study_spine as spine
from prfl.config import load_config
from prfl.factory.backbone import build_backbone
from prfl.factory.clips import build_manifest, join_manifests

RUNS = Path("runs/study-lasting")
CONFIG = "configs/tiny/prfl.yaml"
ROUNDS = 5
HELD_OUT = f"evaluation.held_out_reward={spine.REWARDS}/adapter-1/reward"
REFRESHED = RUNS / "refreshed-reward"
GUARDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "a lower rate": ("training.learning_rate=2.5e-4",),
    "a falling rate": (spine.FALLING,),
    "SFT before every step": (spine.EACH,),
    "distance to the base": ("objective.distance_weight=3",),
    # The head that the others are watched by is one of the three.
    "three heads, less their spread": (
        methods.ENSEMBLE, "reward.uncertainty_weight=1.0", "evaluation.held_out_reward=null"
    ),
    "best round by another head": ("evaluation.keep_best=validation/held_out/total",),
    "a refreshed head": (f"reward.path={REFRESHED}/reward",),
}  # fmt: skip


def always(steps: int) -> list[str]:
    return [
        spine.LATENT, spine.MIXTURE, *methods.FRUGAL, "rollout.steps=20", spine.FOURTH, HELD_OUT,
        "training.learning_rate=1e-3", f"training.steps={steps}", f"training.batch={methods.BATCH}",
        f"evaluation.every={steps // ROUNDS}", "evaluation.prompts_per_round=24", "evaluation.samples_per_prompt=4",
        "evaluation.steps=20", "evaluation.final_samples=0",
    ]  # fmt: skip


def run(guard: str, seed: int, steps: int) -> Path:
    overrides = [*always(steps), *GUARDS[guard], f"seed={seed}"]
    return studies.train(RUNS / f"{spine.slug(guard)}-{seed}", CONFIG, overrides)


def label(policy: Path, out: Path) -> None:
    """Write a manifest of the first reward's labels and, for a third as many clips of a run's policy, theirs."""
    manifests = []
    for overrides in (study_reward.LABELS[:3], [
        "data.generator.per_prompt=24", "data.generator.held_out_per_prompt=8", "data.generator.other_captions=1",
        f"data.generator.policies=[{policy}]",
    ]):  # fmt: skip
        config = load_config(study_reward.CONFIG, list(overrides))
        manifests.append(build_manifest(config, build_backbone(config), iter))
    out.write_text(str(join_manifests(manifests)), encoding="utf-8")


def refreshed(policy: Path) -> Path:
    """Train a reward as study_reward's "adapter", of those labels; returns its folder."""
    out = RUNS / "labels.txt"
    if not out.exists():
        studies.run([__file__, "--label", str(policy), str(out)], RUNS / "label.txt")
    _, adapter = study_reward.HEADS["adapter"]
    labels = f"data.manifest={out.read_text(encoding='utf-8')}"
    rest = [*study_reward.LABELS[3:], *adapter, "data.generator=null", labels]
    return studies.train(REFRESHED, study_reward.CONFIG, [*rest, "seed=0"])


def curve(folder: Path) -> list[dict]:
    keys = ("step", "judge/all", "reward/total", "held_out/total", "motion", "diversity", "distance")
    return [{key: record[key] for key in keys if key in record} for record in studies.rounds(folder, "judge/all")]


def study(guards: list[str], steps: int) -> dict:
    with studies.pool() as pool:
        first = pool.submit(run, "plain", 0, steps)
        reward = pool.submit(lambda: refreshed(first.result())) if "a refreshed head" in guards else None
        late = ("a refreshed head",)  # last: the pool's two workers must not wait for it before it is trained
        order = [*(guard for guard in guards if guard not in late), *(guard for guard in late if guard in guards)]

        def trained(guard: str, seed: int) -> Path:
            if guard in late:
                assert reward is not None
                reward.result()
            return first.result() if (guard, seed) == ("plain", 0) else run(guard, seed, steps)

        runs = {(guard, seed): pool.submit(trained, guard, seed) for guard in order for seed in studies.SEEDS}
        folders = {key: each.result() for key, each in runs.items()}
        rows = spine.tested(pool, folders, order)
    return {
        "steps": steps,
        "always": always(steps),
        "guards": {
            guard: {"overrides": GUARDS[guard], "curves": [curve(folders[guard, seed]) for seed in studies.SEEDS]}
            for guard in order
        },
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of every run")
    parser.add_argument("--guards", nargs="+", choices=GUARDS, default=list(GUARDS), help="only these")
    parser.add_argument("--add", action="store_true", help="keep what --out has of others; run plain again, too")
    parser.add_argument("--out", type=Path, default=Path("bench/results/lasting.json"))
    parser.add_argument("--label", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.label:
        label(*options.label)
    else:
        studies.write(options.out, study(options.guards, options.steps), "guards" if options.add else "")


if __name__ == "__main__":
    main()
