"""What a gradient costs, calculated: the page says what the file says, and the file what its sources give."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bench.harness import study_tables

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPOSITORY / "bench")
    return import_module("bench.gradient_cost")


def test_the_page_has_the_files_table_and_says_that_it_is_calculated(script: Any) -> None:
    found = json.loads((REPOSITORY / "bench/results/gradient_cost.json").read_text())
    assert "calculated" in found["how"]
    page = (REPOSITORY / "bench/README.md").read_text()
    section = page[page.index("## What a gradient costs") :].split("\n## ")[0]
    assert "**Calculated, not measured**" in section
    assert study_tables.markdown(*study_tables.gradient(found)) in section


def test_a_calls_seconds_are_still_those_of_the_counts(script: Any) -> None:
    tables = json.loads((REPOSITORY / "bench/results/gradient_cost.json").read_text())["tables"]
    for model in script.MODELS:
        for kernels, mode in ((False, "full"), (True, "full, kernels")):
            held = tables[f"{model}, {mode}"]["seconds of a call"]
            assert script.calculated(model, kernels)._asdict() == pytest.approx(held)


def test_a_plans_cost_is_counted_from_the_config_as_it_is(script: Any) -> None:
    tables = json.loads((REPOSITORY / "bench/results/gradient_cost.json").read_text())["tables"]
    held = tables["14B 480p, full, kernels"]["GPU-seconds of a gradient"]
    seconds = script.calculated("14B 480p", kernels=True)
    found = script.cost(script.MODELS["14B 480p"][0], stride=2, gradients=4, seconds=seconds)
    assert found == pytest.approx(held["stride 2, 4 gradients a rollout"])
