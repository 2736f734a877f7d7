"""A reward, a method, a generator and a solver are chosen by a line of a table, and by nothing else."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from prfl.config.section import Section, kinds
from prfl.config.sections import public_rewards
from prfl.config.sections.data import GeneratorBase
from prfl.config.sections.reward import RewardBase
from prfl.config.sections.reward_gradient import RewardGradientConfig
from prfl.config.sections.rollout import SOLVERS as FACTS
from prfl.factory.clips import GENERATORS
from prfl.factory.objective import METHODS
from prfl.factory.reward import NEW_REWARDS, PUBLIC_REWARDS
from prfl.reward.scorer import PixelScorer
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.solvers import SOLVERS

REPOSITORY = Path(__file__).parents[2]
CHOOSE = ("prfl/config", "prfl/factory")  # the folders that may ask which section a config has


def section_checks(source: str) -> Iterator[int]:
    """The lines that ask whether something is of a config's section."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            names = [inner.id for inner in ast.walk(node.args[1]) if isinstance(inner, ast.Name)]
            if any(name.endswith("Config") for name in names):
                yield node.lineno


def test_only_the_factory_asks_for_the_class_of_a_section() -> None:
    files = [path for folder in ("prfl", "bench") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    places = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in files}
    assert len(places) > 200
    wrong = [
        f"{place}:{line}"
        for place, source in places.items()
        if not place.startswith(CHOOSE)
        for line in section_checks(source)
    ]
    assert not wrong, "ask a property of the config, or give the section one"


def test_the_gate_finds_a_check() -> None:
    assert list(section_checks("a = 1\nif isinstance(own, SftConfig | VaderConfig):\n    pass")) == [2]


@pytest.mark.parametrize(
    ("table", "sections"),
    [
        (METHODS, kinds(RewardGradientConfig, "name")),
        (GENERATORS, kinds(GeneratorBase, "name")),
        (NEW_REWARDS, kinds(RewardBase, "space")),
        (PUBLIC_REWARDS, [section for section in vars(public_rewards).values() if "key" in dir(section)]),
    ],
    ids=["methods", "generators", "new rewards", "public rewards"],
)
def test_every_section_has_its_line(table: dict[type[Section], object], sections: list[type[Section]]) -> None:
    assert set(table) == set(sections)


@pytest.mark.parametrize("section", METHODS, ids=lambda section: section.__name__)
def test_every_key_of_a_method_is_taken(section: type[Section]) -> None:
    """``build_by_name`` leaves out what nobody has a parameter for: a misspelt one would do nothing."""
    taken = {*inspect.signature(METHODS[section]).parameters, *inspect.signature(PixelScorer).parameters}
    assert set(section.model_fields) - set(RewardGradientConfig.model_fields) <= taken


def test_the_facts_of_a_solver_are_those_of_its_coefficients() -> None:
    assert set(FACTS) == set(SOLVERS)
    sigmas = chain_sigmas(6, 3.0)
    for name, facts in FACTS.items():
        settings = dict.fromkeys(facts.keys, 0.7)
        chain = SOLVERS[name](sigmas, **settings)
        assert facts.stochastic == any(chain.c), name
        assert facts.multistep == any(set(b) != {i} for i, b in enumerate(chain.b)), name
        one_leap = all(b == {i: float(sigmas[i + 1] - sigmas[i])} for i, b in enumerate(chain.b))
        assert facts.takes_leaps == (one_leap and set(chain.a) == {1.0}), name
