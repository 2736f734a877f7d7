"""What the study of active choice reads off its curves."""

from __future__ import annotations

import pytest
import torch

from bench import study_labels
from bench.harness.label_tables import labels

RANDOM = {60: 0.55, 120: 0.6, 240: 0.6, 480: 0.65, 960: 0.64}


@pytest.mark.parametrize(
    ("accuracy", "answers"), [(0.5, 60), (0.55, 60), (0.575, 60 * 2**0.5), (0.6, 120), (0.65, 480), (0.7, 960)]
)
def test_the_first_number_of_random_answers_that_is_as_good(accuracy: float, answers: float) -> None:
    assert study_labels.same_accuracy(RANDOM, accuracy) == pytest.approx(answers)


def test_rows_and_their_table() -> None:
    def measured(of_way: dict[int, float]) -> dict[int, dict[str, float]]:
        return {count: {"accuracy": value, "ties": 0.25} for count, value in of_way.items()}

    uncertain = {60: 0.55, 120: 0.6, 240: 0.65, 480: 0.7}
    differ = {count: value - 0.025 for count, value in uncertain.items()}
    ways = {"random": RANDOM | {1920: 0.66}, "uncertain": uncertain, "disagreement": differ}
    seed = {way: measured(of_way) for way, of_way in ways.items()}
    rows = study_labels.rows_of([seed, seed])
    assert [row.get("uncertain", {}).get("random answers for the same") for row in rows] == [
        None, 120, 480, 1920, None, None,
    ]  # fmt: skip
    head, body = labels({"rows": rows})
    assert body[2][:4] == ["240", "0.600 ± 0.000", "0.650 ± 0.000", "480 (480 to 480)"]
    assert body[2][4:] == ["0.625 ± 0.000", "339 (339 to 339)"]
    assert body[4] == ["960", "0.640 ± 0.000", "", "", "", ""] and len(head) == 6


def test_heads_that_agree_on_an_even_pair_are_not_asked_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pair 0: all say even; pair 1: they differ; pair 2: all say the first by far."""
    by_head = {0: [0.0, -0.5, 3.0], 1: [0.1, 0.5, 3.1], 2: [0.0, 0.1, 2.9]}

    def clean_scores(head: int, data: object) -> dict[str, dict[str, float]]:
        """The first of pair n is row 2 n, and scores that much more than the second."""
        rows = [score for gap in by_head[head] for score in (gap, 0.0)]
        return {str(row): {"better": score} for row, score in enumerate(rows)}

    monkeypatch.setattr(study_labels, "clean_scores", clean_scores)
    data = study_labels.Pool(features=[], pairs=[(0, 1), (2, 3), (4, 5)], answers=torch.zeros(3))
    assert study_labels.asked_first([0, 1, 2], data, [0, 1, 2], 2) == [1, 2]
