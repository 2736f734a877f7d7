"""Results of runs whose folders are gone, and new ones beside them (bench/studies.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import same_numbers, studies, study_methods
from bench.harness import study_tables


def row(name: str, right: float, less: dict[str, float]) -> dict[str, Any]:
    return {"generator": name, "right per seed": [right, right + 0.1], "right, less that of": less}


def result(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    names = [each["generator"] for each in rows if each["generator"] != "base"]
    return {"budget": 10, "recipes": {name: {"steps": len(name)} for name in names}, "rows": list(rows), **more}


BASE, PRFL = row("base", 0.3, {"prfl": -0.2}), row("prfl", 0.5, {"base": 0.2})


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    path = tmp_path / "study.json"
    studies.write(path, result(BASE, PRFL, row("refl", 0.4, {"prfl": -0.1})))
    return path


def test_earlier_rows_stay_beside_new_ones(earlier: Path) -> None:
    again = row("prfl", 0.504, {"base": 0.204, "vader": 0.1})  # a sample fell the other way
    new = result(row("base", 0.3, {"vader": -0.1}), again, row("vader", 0.4, {"prfl": -0.1}))
    studies.write(earlier, new, add="recipes")
    found = json.loads(earlier.read_text())
    rows = {each["generator"]: each for each in found["rows"]}
    assert rows.keys() == {"base", "prfl", "refl", "vader"}
    assert rows["base"]["right, less that of"] == {"prfl": -0.2, "vader": -0.1}
    assert (
        rows["prfl"]["right per seed"] == PRFL["right per seed"] and rows["prfl"]["right per seed, again"][0] == 0.504
    )
    assert rows["prfl"]["right, less that of"] == {"base": 0.2, "vader": 0.1}
    assert found["recipes"].keys() == {"prfl", "refl", "vader"}
    (before,) = found["earlier"]
    assert before["rows"] == ["base", "prfl", "refl"] and before["command"] and before["commit"] and before["machine"]


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (result(BASE, row("prfl", 0.52, {})), "prfl has .* not the same runs"),
        (result(BASE, row("vader", 0.5, {})), "run one of its rows again"),
        (result(BASE, PRFL, budget=20), "budget is 10 there and 20 here"),
    ],
)
def test_what_does_not_fit_is_refused(earlier: Path, new: dict, message: str) -> None:
    before = earlier.read_text()
    with pytest.raises(SystemExit, match=message):
        studies.write(earlier, new, add="recipes")
    assert earlier.read_text() == before


def test_new_seconds_move_the_curves() -> None:
    recipe = {"seconds per step": 2.0, "curves": [[{"step": 3, "seconds": 6.0}], [{"step": 5, "seconds": 10.0}]]}
    found = study_methods.repaced({"recipes": {"prfl": recipe}}, {"prfl": 1.5, "absent": 1.0})["recipes"]["prfl"]
    assert found["seconds per step"] == 1.5
    assert [point["seconds"] for curve in found["curves"] for point in curve] == [4.5, 7.5]


def points(*right: float, seconds: float) -> list[dict]:
    return [
        {"judge/all": each, "seconds": seconds * n, "evaluations": 400 * n, "step": n} for n, each in enumerate(right)
    ]


def test_curves_are_read_at_equal_time() -> None:
    """Between rounds along a line, the mean of the seeds; nowhere past the end of one of them."""
    found = study_tables.at_equal([points(0.0, 0.5, 0.5, 0.8, seconds=20), points(0.2, 0.2, 0.4, 0.4, seconds=20)])
    assert found["seconds"] == pytest.approx({"30": (0.5 + 0.3) / 2, "55": (0.5 + 0.3 * 0.75 + 0.4) / 2})
    short = study_tables.at_equal([points(0.0, 0.5, 0.5, 0.8, seconds=20), points(0.0, 0.2, seconds=20)])
    assert short == {"evaluations": {}, "seconds": {}}


@pytest.mark.parametrize(("name", "ages", "expected"), [
    ("prfl, stride 2, 4 gradients", (0, 1, 2, 3, 0, 0, 1, 2, 3, 0), {"made": 4, "planned": 3}),
    ("prfl", (), {}),
])  # fmt: skip
def test_rollouts_are_counted(tmp_path: Path, name: str, ages: tuple, expected: dict) -> None:
    """One more than planned: the drift passed its limit in the fifth step."""
    lines = [{"step": n + 1, "phase": "training", "rollout_age": float(age)} for n, age in enumerate(ages)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in [{"step": 0}, *lines]))
    assert study_methods.rollouts(name, tmp_path, 10) == expected


def test_a_pace_is_that_of_a_mean_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timed steps had two thirds of a mean step's evaluations."""
    lines = [{"step": n, "seconds/step": 2.5, "seconds/distance": 0.5} for n in study_methods.PACE]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    monkeypatch.setattr(studies, "train", lambda *_: tmp_path)
    monkeypatch.setattr(study_methods, "evaluations", lambda name, first=0, steps=200: 6.0 if first else 9.0)
    assert study_methods.pace("prfl, half the budget") == pytest.approx(3.0)


def test_rounds_of_a_run_have_the_names_of_its_results(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "phase": "training", "reward/total": 0.1},
        {"step": 1, "phase": "validation", "validation/judge/all": 0.5, "validation/reward/total": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert studies.rounds(tmp_path, "judge/all") == [{"step": 1, "judge/all": 0.5, "reward/total": 0.2}]
    assert studies.records(tmp_path, "reward/total") == rows[:1]


def test_two_commits_are_compared_by_todays_names(tmp_path: Path) -> None:
    """The same run, by a version without phases and by this one; then one whose round says something else."""
    old = [{"step": 1, "loss": 0.5, "seconds/step": 2.0}, {"step": 1, "distance": 0.1}]
    new = [
        {"step": 1, "phase": "training", "loss": 0.5, "seconds/step": 1.0},
        {"step": 1, "phase": "validation", "validation/distance": 0.1},
    ]
    changed = [new[0], {**new[1], "validation/distance": 0.2}]
    for name, rows in (("old", old), ("new", new), ("changed", changed)):
        (tmp_path / name / "runs").mkdir(parents=True)
        (tmp_path / name / "runs" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert same_numbers.differences(tmp_path / "old", tmp_path / "new") == []
    (difference,) = same_numbers.differences(tmp_path / "old", tmp_path / "changed")
    assert "step 1: validation/distance" in difference


def test_a_run_that_was_stopped_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its report is there: it is written at every round."""
    (tmp_path / "report.html").touch()
    commands: list[list[str]] = []
    monkeypatch.setattr(studies, "run", lambda command, console: commands.append(command))
    for _ in range(2):
        assert studies.train(tmp_path, "prfl.yaml", ["seed=1"]) == tmp_path
    assert len(commands) == 1 and commands[0][-1] == "seed=1", "once, and then it has finished"
