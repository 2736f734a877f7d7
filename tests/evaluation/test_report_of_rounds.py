"""The report of a run that drew no samples at its end: before and after are rounds of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from prfl.evaluation import run_files
from prfl.evaluation.page.compared import before_and_after, kept_step, rounds_of
from prfl.evaluation.page.results import headline, verdict_sentence
from prfl.evaluation.page.terms import MEANINGS, meaning
from prfl.evaluation.page.videos import LONGEST_STRIP, spread, step_name
from prfl.evaluation.policy_eval import Outcome, write_results
from prfl.evaluation.report import write_report
from prfl.evaluation.run_files import RunFiles
from prfl.rollout.sampling import SamplingSettings, jobs

SETTINGS = SamplingSettings(frames=5, height=8, width=8, steps=2, batch=4)


def drawn(reward: float, motion: float = 1.0, prompts: int = 6, judge: float | None = None, size: float = 1.0):
    """A round: each sample's reward is ``reward`` and a little of its own; the judge finds ``judge`` of ten right."""
    names, indices = jobs([f"prompt {n}" for n in range(prompts)], 2)
    own = torch.rand(len(names), generator=torch.Generator().manual_seed(0))
    scores = {"motion": motion + 0.1 * own, "reward/total": reward + own}
    if judge is not None:
        scores["judge/all"] = (torch.arange(len(names)) % 10 < judge).float()
        scores["measured/size"] = size + 0.1 * own
    return Outcome("policy", SETTINGS, names, indices, scores, {}, torch.zeros(2, 3, 2, 32, 32), seconds=1.0)


def run_of(path: Path, rounds: dict[int, Outcome], kept: int | None = None) -> Path:
    for step, outcome in rounds.items():
        write_results(path / "samples" / f"step-{step:06d}", [outcome], fps=8.0)
    numbers = {} if kept is None else {"validation/kept/step": float(kept)}
    rows = [{"step": step, "phase": "validation", "validation/motion": 1.0, **numbers} for step in rounds]
    rows += [{"step": step, "phase": "training", "loss": 1.0 / step} for step in range(1, 5)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentence(path: Path, rounds: dict[int, Outcome]) -> str:
    results = before_and_after(rounds_of(RunFiles(path), run_of(path, rounds)), None)
    assert results is not None
    return verdict_sentence(results, headline(results))


@pytest.mark.usefixtures("blank_pictures")
def test_step_zero_is_the_base_and_every_round_is_in_the_strip(tmp_path: Path) -> None:
    run_of(tmp_path, {0: drawn(0.0), 10: drawn(1.0), 20: drawn(2.0)})
    page = write_report(tmp_path).read_text()
    assert "policy − base" in page and "+2.000" in page
    before_after, strips = page.split("<h2>Over the steps</h2>")
    assert before_after.count("data:video/mp4") == 4, "two prompts, base and policy"
    assert strips.count("data:video/mp4") == 6 and "step 0 (base)" in strips and "step 10" in strips
    # Links lead to the files of the run, and nowhere else.
    links = set(re.findall(r'href="([^"]*)"', page))
    assert links == {f"samples/step-{step:06d}/videos/policy-{n:03d}.mp4" for step in (0, 10, 20) for n in (0, 1)}
    assert all((tmp_path / link).is_file() for link in links)
    assert page.index("policy − base") < page.index("<th scope=col>base</th>"), "the difference comes first"


@pytest.mark.usefixtures("blank_pictures")
def test_the_policy_that_is_kept_is_the_one_compared(tmp_path: Path) -> None:
    run_of(tmp_path, {0: drawn(0.0), 10: drawn(1.5), 20: drawn(1.0)}, kept=10)
    page = write_report(tmp_path).read_text()
    assert "+1.500" in page and "policy step 10, the best round" in page and "step 10 (kept)" in page
    assert kept_step([{"validation/kept/step": 5.0}, {"step": 6, "loss": 1.0}]) == 5 and kept_step([]) is None


@pytest.mark.usefixtures("blank_pictures")
def test_rounds_of_other_samples_are_not_compared(tmp_path: Path) -> None:
    """The number of prompts was changed on the way: what is left of the run has no base."""
    run_of(tmp_path, {0: drawn(0.0, prompts=5), 10: drawn(1.0), 20: drawn(2.0)})
    page = write_report(tmp_path).read_text()
    assert "policy − base" not in page and "step 10" in page and "step 0" not in page
    assert [each.step for each in rounds_of(RunFiles(tmp_path), tmp_path)] == [10, 20]


@pytest.mark.usefixtures("blank_pictures")
def test_a_final_policy_without_its_base_stands_beside_the_rounds(tmp_path: Path) -> None:
    """After full fine-tuning the base is gone at the end, and step 0 is all there is of it."""
    run_of(tmp_path, {0: drawn(0.0), 10: drawn(1.0)})
    write_results(tmp_path / "samples" / "final", [drawn(3.0)], fps=8.0)
    page = write_report(tmp_path).read_text()
    assert "<h2>Results</h2>" in page and "<h2>Results on validation prompts</h2>" in page and "policy − base" in page


def test_the_verdict_is_one_sentence_that_says_what_was_measured(tmp_path: Path) -> None:
    only_reward = sentence(tmp_path / "a", {0: drawn(0.0), 10: drawn(1.0)})
    assert only_reward.startswith("A gain in the trained reward: 0.") and "look at them" in only_reward
    judged = sentence(tmp_path / "b", {0: drawn(0.0, judge=3), 10: drawn(1.0, judge=8)})
    assert judged.startswith("A gain in samples right in everything") and "look at them" not in judged
    assert sentence(tmp_path / "c", {0: drawn(0.0, judge=3), 10: drawn(1.0, judge=3)}).startswith("No clear change")
    assert sentence(tmp_path / "d", {0: drawn(1.0), 10: drawn(0.0)}).startswith("A loss in the trained reward")
    few = sentence(tmp_path / "e", {0: drawn(0.0, prompts=2), 10: drawn(1.0, prompts=2)})
    assert few.startswith("No clear change") and "2 prompts are too few to tell" in few
    hacked = sentence(tmp_path / "f", {0: drawn(0.0), 10: drawn(1.0, motion=0.5)})
    assert "but motion fell, as when a reward is hacked" in hacked
    swollen = sentence(tmp_path / "g", {0: drawn(0.0, judge=3), 10: drawn(1.0, judge=8, size=1.3)})
    assert swollen.startswith("A gain") and "; meanwhile size is 1.3" in swollen and "+0.30." in swollen
    assert "meanwhile" not in judged
    assert all(text.endswith(".") and text.count(". ") == 0 for text in (only_reward, judged, few, hacked))


def test_tiles_say_what_was_counted(tmp_path: Path) -> None:
    run_of(tmp_path, {0: drawn(0.0, judge=3), 10: drawn(1.0, judge=8)})
    page = write_report(tmp_path).read_text()
    assert "5 of 12 samples" in page and "10 of 12 samples" in page  # 12 samples: 0 to 9, then 0 and 1 again
    assert "mean of 12 samples" in write_report(run_of(tmp_path / "r", {0: drawn(0.0), 10: drawn(1.0)})).read_text()


def test_a_strip_has_the_first_the_last_and_the_kept_round(tmp_path: Path) -> None:
    run_of(tmp_path, {step: drawn(float(step)) for step in range(0, 40, 2)})
    rounds = rounds_of(RunFiles(tmp_path), tmp_path)
    steps = [each.step for each in spread(rounds, kept=6)]
    assert steps[0] == 0 and steps[-1] == 38 and 6 in steps and len(steps) <= LONGEST_STRIP + 1
    assert steps == sorted(set(steps)) and [each.step for each in spread(rounds[:2], None)] == [0, 2]
    assert [step_name(0, None), step_name(4, 4)] == ["step 0 (base)", "step 4 (kept)"]


@pytest.mark.usefixtures("blank_pictures")
def test_strips_too_large_for_a_page_are_played_from_the_run_folder(tmp_path: Path, monkeypatch) -> None:
    run_of(tmp_path, {0: drawn(0.0), 10: drawn(1.0)})
    monkeypatch.setattr(run_files, "STRIPS", 1000)
    strips = write_report(tmp_path).read_text().split("<h2>Over the steps</h2>")[1]
    assert "data:video/mp4" not in strips and 'src="samples/step-000010/videos/policy-001.mp4"' in strips
    assert "not inside the page" in strips


def test_every_measure_is_explained() -> None:
    assert meaning("validation/judge/all") == meaning("judge/all") == MEANINGS["judge/all"]
    assert "score of speed" in meaning("reward/speed") and "at sigma 0.5" in meaning("validation/accuracy/sigma 0.5")
    assert meaning("reward") == MEANINGS["reward"] and meaning("something") == ""
