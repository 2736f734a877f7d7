"""A config that extends another: the other's keys, with its own over them; errors name the file that is to blame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from prfl.config import config_hash, dump_resolved, load_config
from prfl.utils.errors import PrflError
from tests.config.conftest import CONFIG

Write = Callable[..., Path]


def child(write: Write, text: str, base: str = CONFIG) -> Path:
    write(base, "base.yaml")
    return write(f"version: 1\nextends: base.yaml\nrun: runs/child\n{text}", "child.yaml")


def merged(write: Write, text: str, base: str = CONFIG) -> dict[str, Any]:
    return load_config(child(write, text, base)).model_dump(mode="json")


def test_only_its_own_keys_differ(write: Write) -> None:
    own = merged(write, "rollout: {steps: 7, shift: 2.0}\nbackbone: {adapter: {rank: 8}}\nseed: 3")
    base = load_config(write(CONFIG)).model_dump(mode="json")
    assert own["rollout"] == {**base["rollout"], "steps": 7, "shift": 2.0}
    assert own["backbone"]["adapter"] == {**base["backbone"]["adapter"], "rank": 8} and own["seed"] == 3
    same = [key for key in base if key not in ("run", "seed", "rollout", "backbone")]
    assert {key: own[key] for key in same} == {key: base[key] for key in same}


def test_it_is_the_config_that_is_written_out(write: Write) -> None:
    """A run of the one is resumed by the other: the hash is of the resolved config."""
    config = load_config(child(write, "training: {batch: 4}"))
    whole = yaml.safe_load(CONFIG)
    whole["training"]["batch"] = 4
    written = load_config(write(yaml.safe_dump({**whole, "run": "runs/child"}), "whole.yaml"))
    assert config == written and config_hash(config) == config_hash(written)
    assert "extends" not in dump_resolved(config)


def test_a_section_of_another_kind_inherits_nothing(write: Write) -> None:
    base = CONFIG.replace("{name: prfl, sft: {}}", "{name: prfl, handoff: clean, sft: {}}")
    own = merged(write, "objective: {name: vader}\ndata: {generator: null}", base)
    assert own["objective"]["name"] == "vader" and own["objective"]["sft"] is None
    own = merged(write, "objective: {steps_range: [0, 0.5]}", base)
    assert own["objective"]["handoff"] == "clean" and own["objective"]["steps_range"] == [0, 0.5]


def test_a_value_is_replaced_as_a_whole(write: Write) -> None:
    base = CONFIG.replace("path: somewhere", "path: [a, b], weights: {look: 1.0, motion: 2.0}")
    own = merged(write, "reward: {path: [c, d], weights: {look: 3.0}}", base)
    assert own["reward"]["path"] == ["c", "d"] and own["reward"]["weights"] == {"look": 3.0}


def test_a_reference_that_is_inherited(write: Write) -> None:
    write("run: runs/head", "reward.yaml")
    own = merged(write, "", CONFIG.replace("somewhere", "'${stages.reward.run}/reward'"))
    assert own["reward"]["path"] == "runs/head/reward"


@pytest.mark.parametrize(
    ("text", "base", "overrides", "expected"),
    [
        ("rollout: {steps: 0}", CONFIG, [], "child.yaml: rollout.steps: "),
        ("", CONFIG.replace("batch: 2", "batch: 0"), [], "base.yaml: training.batch: "),
        ("rollout: {stesp: 7}", CONFIG, [], "child.yaml: rollout.stesp: unknown key"),
        ("", CONFIG.replace("{steps: 10}", "{steps: 10, shfit: 1}"), [], "base.yaml: rollout.shfit: unknown key"),
        ("", CONFIG.replace("rollout: {steps: 10}\n", ""), [], "child.yaml: rollout: missing"),
        ("objective: {name: vader, last_steps: 11, sft: {}}", CONFIG, [], "child.yaml: objective.last_steps: "),
        ("", CONFIG.replace("somewhere", "[a, 1]"), [], "base.yaml: reward.path"),
        ("rollout: {steps: 7}", CONFIG, ["rollout.steps=0"], "command line: rollout.steps: "),
        ("rollout: {stride: 2}", CONFIG.replace("10}", "10, solver: unipc}"), [], "child.yaml: rollout.stride: unipc"),
        ("", CONFIG.replace("somewhere", "'${stages.head.path}'"), [], "base.yaml: reward.path: cannot resolve"),
    ],
)
def test_an_error_names_the_file_that_gives_the_key(
    write: Write, text: str, base: str, overrides: list[str], expected: str
) -> None:
    with pytest.raises(PrflError) as caught:
        load_config(child(write, text, base), overrides)
    assert expected in str(caught.value), str(caught.value)


def test_the_run_folder_is_its_own(write: Write) -> None:
    write(CONFIG, "base.yaml")
    with pytest.raises(PrflError, match="child.yaml: run: missing"):
        load_config(write("extends: base.yaml", "child.yaml"))


@pytest.mark.parametrize(
    ("extends", "what"),
    [
        ("nothing.yaml", "there is no"),
        ("../base.yaml", "not the name of another file beside it"),
        ("child.yaml", "not the name of another file beside it"),
        ("[base.yaml]", "not the name of another file beside it"),
        ("middle.yaml", "extends another file itself"),
        ("stages.yaml", "has stages"),
    ],
)
def test_what_cannot_be_extended(write: Write, extends: str, what: str) -> None:
    write(CONFIG, "base.yaml")
    write("extends: base.yaml", "middle.yaml")
    write("version: 1\nstages: [base.yaml]", "stages.yaml")
    with pytest.raises(PrflError) as caught:
        load_config(write(f"extends: {extends}\nrun: runs/x", "child.yaml"))
    assert what in str(caught.value) and "child.yaml: extends" in str(caught.value)
