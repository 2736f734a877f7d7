"""The results that a report shows: base and policy from the same noise.

They are those of the run's end (samples/final), or, where it drew none, the base's and the policy's round on validation
prompts: at step 0 the policy is the base, and every round starts from the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prfl.evaluation import hacking
from prfl.evaluation.policy_eval import Outcome, outcome_in, results_facts
from prfl.evaluation.run_files import RunFiles

KEYS = ("outcomes", "rows", "videos")  # of a results.json


@dataclass(frozen=True)
class Results:
    """The content of a results.json, and where it lies: its videos are below ``folder``.

    drawn: what the samples are, as a person would say it.
    """

    folder: Path
    content: Mapping[str, Any]
    drawn: str = ""

    @property
    def names(self) -> list[str]:
        return list(self.content["outcomes"])

    def outcome(self, name: str) -> Outcome:
        return outcome_in(self.content, name)


@dataclass(frozen=True)
class Round:
    """One round on validation prompts."""

    step: int
    results: Results


def final_results(files: RunFiles, run: Path) -> Results | None:
    return _read(files, run / "samples" / "final", "test prompts, after the last step")


def sampled_results(files: RunFiles, run: Path) -> Results | None:
    """Read what `prfl sample` drew."""
    return _read(files, run / "samples" / "sampled", "by prfl sample")


def _read(files: RunFiles, folder: Path, drawn: str) -> Results | None:
    content = files.json(folder / "results.json", *KEYS)
    return Results(folder, content, drawn) if content else None


def rounds_of(files: RunFiles, run: Path) -> list[Round]:
    """Read the rounds that measured the same samples as the last one, oldest first; damaged ones are passed over."""
    rounds = []
    for step, path in sorted(hacking.round_files(run / "samples")):
        content = files.json(path, *KEYS)
        if content and "policy" in content["outcomes"]:
            rounds.append(Round(step, Results(path.parent, content, f"validation prompts, at step {step}")))
    if not rounds:
        return []
    last = rounds[-1].results.outcome("policy")
    return [each for each in rounds if hacking.same_samples(each.results.outcome("policy"), last)]


def before_and_after(rounds: Sequence[Round], kept: int | None) -> Results | None:
    """Join the first round, which is the base's, with that of the result: of step ``kept``, None is the last one."""
    if not rounds:
        return None
    first = rounds[0]
    after = next((each for each in rounds if each.step == kept), rounds[-1])
    if first.step != 0 or after.step == 0:
        return after.results

    base, policy = first.results.outcome("policy"), after.results.outcome("policy")
    outcomes = {"base": results_facts(base, base), "policy": results_facts(policy, base)}
    pairs = zip(first.results.content["rows"], after.results.content["rows"], strict=True)
    rows = [{**later, "base": earlier["policy"]} for earlier, later in pairs]
    earlier_folder = f"../{first.results.folder.name}"
    videos = [
        {"row": entry["row"], "files": {"base": f"{earlier_folder}/{before['files']['policy']}", **entry["files"]}}
        for before, entry in zip(first.results.content["videos"], after.results.content["videos"], strict=False)
    ]
    best = ", the best round" if kept is not None and after is not rounds[-1] else ""
    drawn = f"validation prompts; the base is step 0, the policy step {after.step}{best}"
    content = {**after.results.content, "outcomes": outcomes, "rows": rows, "videos": videos}
    return Results(after.results.folder, content, drawn)


def kept_step(records: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the step whose policy the run keeps, where it keeps the best of its rounds."""
    steps = [record["validation/kept/step"] for record in records if "validation/kept/step" in record]
    return int(steps[-1]) if steps else None
