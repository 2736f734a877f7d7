"""Signals end runs here, also where the tests were started in the background."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.signals import not_ignored


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal() -> Iterator[None]:
    with not_ignored():
        yield
