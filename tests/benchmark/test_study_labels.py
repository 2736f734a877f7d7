"""What the study of active choice reads off its curves."""

from __future__ import annotations

import pytest

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
    seed = {"random": measured(RANDOM), "uncertain": measured(uncertain)}
    rows = study_labels.rows_of([seed, seed])
    assert [row.get("random answers for the same") for row in rows] == [None, 120, 480, 960, None]
    head, body = labels({"rows": rows})
    assert body[2] == ["240", "0.600 ± 0.000", "0.650 ± 0.000", "+0.050 ± 0.000", "480", "480 to 480"]
    assert body[4] == ["960", "0.640 ± 0.000", "", "", "", ""] and len(head) == 6
