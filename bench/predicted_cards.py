"""Which model runs on which card, what to change until it does, and for how many hours: of the shipped configs, as
``prfl train --dry-run --gpu`` says it.

    python bench/predicted_cards.py [--out bench/results/cards.json] [--models "1.3B 480p, VADER, hps" ...]

Memory and work are counted on ``meta`` tensors at the real shapes; nothing is downloaded, allocated or timed.  It takes
half a minute of one core for each of 1.3B; what ``--models`` does not name stays as the file has it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import studies
from prfl.config import load_config
from prfl.estimate.cost import count_cost, total_work
from prfl.estimate.fill import SHARE
from prfl.estimate.fitting import Change, Prediction, fit, on_gpu
from prfl.estimate.tables import hours_text
from prfl.estimate.units import GIB
from prfl.estimate.work import CARD_SIZES, CardSize

REWARDS = (
    "action", "clip", "coherence", "hps", "hpsv3", "imagereward", "mps", "object", "pickscore", "videoalign",
)  # fmt: skip
P480, P720 = ("data.height=480", "data.width=832"), ("data.height=720", "data.width=1280")
MODELS = {  # name: config, overrides
    "1.3B 480p": ("configs/wan2.1-1.3b/prfl.yaml", P480),
    "14B 480p": ("configs/wan2.1-14b/prfl.yaml", P480),
    "14B 720p": ("configs/wan2.1-14b/prfl.yaml", P720),
    "1.3B 480p, VADER, aesthetic": ("configs/wan2.1-1.3b/vader.yaml", ()),
    **{f"1.3B 480p, VADER, {name}": (f"configs/wan2.1-1.3b/vader-{name}.yaml", ()) for name in REWARDS},
    "1.3B 480p, DRaFT-1, videoalign, 81 frames": ("configs/wan2.1-1.3b/videoalign.yaml", ()),
}


def on_cards(config_file: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    before = Prediction.of(on_gpu(load_config(config_file, list(overrides))))
    work = total_work(count_cost(before.config, before.model, before.memory.phases))
    # What is changed for the smallest card is changed for a larger one too, in the same order, until it fits.
    changes = fit(before, CARD_SIZES[min(CARD_SIZES)]).changes
    cards = {}
    for size in CARD_SIZES.values():
        chosen = needed(before.memory.peak, changes, size)
        cards[f"{size.gigabytes} GB"] = {
            "cards": size.names,
            "fits": chosen is not None,
            "changes": [change.overrides for change in chosen or ()],
            "peak GiB": (chosen[-1].peak if chosen else before.memory.peak) / GIB,
            "hours as shipped": list(size.hours(work)),
        }
    return {
        "config": config_file, "overrides": list(overrides), "peak GiB as shipped": before.memory.peak / GIB,
        "always alive GiB": before.always / GIB, "steps": before.config.training.steps, "cards": cards,
    }  # fmt: skip


def needed(peak: int, changes: tuple[Change, ...], size: CardSize) -> tuple[Change, ...] | None:
    """Return the first of the changes with which a run fits; None where it does not with all of them."""
    room = SHARE * size.gib * GIB
    for number in range(len(changes) + 1):
        if (changes[number - 1].peak if number else peak) <= room:
            return changes[:number]
    return None


def row(name: str, model: dict[str, Any]) -> str:
    cells = []
    for card in model["cards"].values():
        how = "; ".join(card["changes"]) or "as shipped"
        cells.append(f"{how}: {card['peak GiB']:.1f} GiB, {hours_text(tuple(card['hours as shipped']))} h")
        if not card["fits"]:
            cells[-1] = "no"
    return f"| {name} | {model['peak GiB as shipped']:.1f} GiB | {' | '.join(cells)} |"


def kept(path: Path, anew: Sequence[str]) -> dict[str, Any]:
    """Read what the file has of other models, each with the commit that it was counted at."""
    if not path.is_file():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    models = {name: model for name, model in before["models"].items() if name not in anew}
    return {name: {"commit": before["commit"], **model} for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cards.json"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    options = parser.parse_args()
    out, models = options.out, kept(options.out, options.models)
    models |= {name: on_cards(*MODELS[name]) for name in options.models}
    how = "counted on meta tensors at real shapes; nothing was timed; hours as in prfl/estimate/work.py"
    studies.write(out, {"how": how, "share of a card": SHARE, "models": models}, weights=studies.COUNTED)
    names = [f"{size.gigabytes} GB ({size.names})" for size in CARD_SIZES.values()]
    print(f"| model | peak | {' | '.join(names)} |\n|{' --- |' * (2 + len(names))}")
    print("\n".join(row(name, model) for name, model in models.items()))


if __name__ == "__main__":
    main()
