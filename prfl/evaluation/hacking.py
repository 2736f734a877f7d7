"""Reward hacking: on held-out prompts the trained reward rises while what it stands for falls.

Each round of a run is compared with the earlier ones, sample by sample from the same noise, so the policy is the only
difference.  The rounds are read from the run folder: a resumed run remembers them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prfl.config.sections.evaluation import FEWEST_PROMPTS
from prfl.evaluation.metrics import Interval
from prfl.evaluation.policy_eval import Outcome, compare, flat, read_outcome, summarise

TRAINED = "reward/total"
# What should not fall, and the share of it whose loss is not yet a fall.  A better video may move a little less.
WATCHED = {"held_out/total": 0.0, "judge/all": 0.0, "motion": 0.1, "diversity": 0.1}


@dataclass(frozen=True)
class HackingAlarm:
    """``measure`` has changed by ``change`` since the round of ``since``, and the trained reward by ``rise``."""

    measure: str
    since: int
    before: float
    change: Interval
    rise: Interval

    def __str__(self) -> str:
        return (
            f"since step {self.since} the trained reward rose by {self.rise} and {self.measure} fell from "
            f"{self.before:.3f}, by {self.change}"
        )


def rounds(samples: Path, step: int) -> list[tuple[int, Outcome]]:
    """Read the policy's rounds up to a step that measured the same samples as the round of that step, oldest first."""
    outcomes: dict[int, Outcome] = {}
    for number, path in round_files(samples):
        if number <= step and (outcome := read_outcome(path, "policy")) is not None:
            outcomes[number] = outcome
    last = outcomes[step]
    return [(number, outcome) for number, outcome in sorted(outcomes.items()) if same_samples(outcome, last)]


def round_files(samples: Path) -> Iterator[tuple[int, Path]]:
    """Yield the step and the results.json of each round."""
    for path in samples.glob("step-*/results.json"):
        yield int(path.parent.name.removeprefix("step-")), path


def same_samples(first: Outcome, second: Outcome) -> bool:
    """Tell whether two outcomes are of the same prompts, drawn from the same noise in the same way."""
    drawn_alike = replace(first.settings, batch=1) == replace(second.settings, batch=1)
    return drawn_alike and (first.prompts, first.indices) == (second.prompts, second.indices)


def find_alarms(history: Sequence[tuple[int, Outcome]]) -> list[HackingAlarm]:
    """Find the measures that are clearly below their own best round.

    The trained reward must be clearly above what it was in that round.  Clearly: by 95 % intervals over prompts.
    """
    *earlier, (_, last) = history
    if not earlier or len(set(last.prompts)) < FEWEST_PROMPTS:
        return []
    means = {step: flat(summarise(outcome)) for step, outcome in earlier}

    alarms = []
    for measure, tolerated in WATCHED.items():
        comparable = [(step, outcome) for step, outcome in earlier if {measure, TRAINED} <= means[step].keys()]
        if not comparable or measure not in flat(summarise(last)):
            continue

        since, best = max(comparable, key=lambda item: means[item[0]][measure])
        change = compare(last, best)
        before = means[since][measure]
        if change[TRAINED].low > 0 and change[measure].high < -tolerated * abs(before):
            alarms.append(HackingAlarm(measure, since, before, change[measure], change[TRAINED]))
    return alarms
