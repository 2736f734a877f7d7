"""Configs of several stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prfl.config import load_config, load_stages
from prfl.utils.errors import PrflError

from .conftest import CONFIG

Write = Callable[..., Path]
STAGES = "version: 1\nstages: [tiny/reward.yaml, tiny/prfl.yaml]\n"
FOLLOWER = CONFIG.replace("path: somewhere", "path: '${stages.reward.run}/head'").replace("runs/x", "runs/prfl")


@pytest.fixture
def story(write: Write) -> Path:
    write(CONFIG.replace("runs/x", "runs/reward"), "tiny/reward.yaml")
    write(FOLLOWER, "tiny/prfl.yaml")
    return write(STAGES, "story.yaml")


def test_a_later_stage_finds_an_earlier_run(story: Path) -> None:
    reward, prfl = load_stages(story)
    assert (reward.name, prfl.name) == ("reward", "prfl")
    assert prfl.config.reward is not None and prfl.config.reward.path == "runs/reward/head"


def test_an_override_of_the_earlier_run_reaches_the_later_stage(story: Path) -> None:
    reward, prfl = load_stages(story, ["reward.run=elsewhere", "prfl.training.steps=7"])
    assert prfl.config.reward is not None and prfl.config.reward.path == "elsewhere/head"
    assert (reward.config.training.steps, prfl.config.training.steps) == (1, 7)


def test_a_stage_alone_finds_the_file_beside_it(story: Path) -> None:
    config = load_config(story.parent / "tiny/prfl.yaml")
    assert config.reward is not None and config.reward.path == "runs/reward/head"
    assert load_stages(story.parent / "tiny/prfl.yaml")[0].config == config


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("tiny/prfl.yaml", "stages.reward.run", "stages.rewrad.run", "no earlier stage is called 'rewrad'"),
        ("tiny/prfl.yaml", "stages.reward.run", "stages.reward.seed", "the one form is ${stages.NAME.run}"),
        ("tiny/prfl.yaml", "stages.reward.run}", "stages.reward.run", "cannot resolve"),
        ("tiny/prfl.yaml", "${stages.reward.run}", "${HOME}", "cannot resolve ${HOME}"),
        ("tiny/prfl.yaml", "stages.reward", "stages...reward", "cannot resolve"),
        ("tiny/prfl.yaml", "runs/prfl", "runs/reward", "an earlier stage has the run folder runs/reward too"),
        ("story.yaml", "tiny/prfl", "tiny/prfk", "no such file"),
        ("story.yaml", "tiny/prfl", "tiny/reward", "two stages are called 'reward'"),
        ("story.yaml", "[tiny/reward.yaml, tiny/prfl.yaml]", "[]", "stages: "),
        ("story.yaml", "version: 1", "version: 1\nseed: 3", "seed: unknown key"),
        ("story.yaml", "[tiny/reward.yaml,", "[tiny/prfl.yaml, tiny/reward.yaml] #", "this is the first"),
    ],
)
def test_mistakes(story: Path, name: str, old: str, new: str, message: str) -> None:
    path = story.parent / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(PrflError) as caught:
        load_stages(story)
    assert message in str(caught.value)


def test_stages_do_not_nest(story: Path, write: Write) -> None:
    write(STAGES, "tiny/reward.yaml")
    with pytest.raises(PrflError, match="a stage cannot have stages"):
        load_stages(story)


def test_one_stage_is_asked_for(story: Path) -> None:
    with pytest.raises(PrflError, match="it has several stages"):
        load_config(story)


@pytest.mark.parametrize("override", ["training.steps=3", "prlf.training.steps=3", "prfl=3", "prfl"])
def test_an_override_must_name_a_stage(story: Path, override: str) -> None:
    with pytest.raises(PrflError, match="names no stage") as caught:
        load_stages(story, [override])
    assert "prfl." in caught.value.fix


def test_a_stage_alone_without_its_neighbour(write: Write) -> None:
    with pytest.raises(PrflError, match="no earlier stage 'reward', and no .*reward.yaml"):
        load_config(write(FOLLOWER))
