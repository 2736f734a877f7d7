"""The schema teaches: every key has a description; every config that ships is valid and says what it is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from prfl.config import json_schema, load_config, load_stages
from prfl.config.messages import all_keys
from prfl.config.schema import Config, StagesConfig
from prfl.config.sections.reward import RewardBase

REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted(REPOSITORY.glob("configs/**/*.yaml"))


def test_every_key_has_a_description() -> None:
    for root in (Config, StagesConfig):
        for path, model in all_keys(root):
            description = model.model_fields[path.rpartition(".")[2]].description
            assert description and description.endswith("."), path


def test_all_keys_sees_through_the_unions() -> None:
    paths = {path for path, _ in all_keys(Config)}
    assert {"objective.last_steps", "objective.sft.every", "reward.head.blocks", "data.generator.per_prompt"} <= paths


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_have_a_header(path: Path) -> None:
    assert load_stages(path)
    header = path.read_text().split("version:")[0]
    for word in ("# Reproduces:", "# Command:", "# Hardware:", "# Expected:"):
        assert word in header, word


def explained_rewards() -> list[str]:
    """Examples of a reward: those of the page, and last that of the message for who writes a list."""
    page = (REPOSITORY / "docs/rewards.md").read_text(encoding="utf-8")
    return [*re.findall(r"```yaml\n(reward:.*?)```", page, re.DOTALL), RewardBase.instead["scores"].split(": ", 1)[1]]


@pytest.mark.parametrize("number", range(len(explained_rewards())))
def test_a_reward_is_written_as_it_is_explained(number: int, tmp_path: Path) -> None:
    text, folder = explained_rewards()[number], REPOSITORY / "configs/wan2.1-1.3b"
    shutil.copy(folder / "prfl.yaml", tmp_path)
    before, _, after = (folder / "videoalign.yaml").read_text(encoding="utf-8").partition("reward:\n")
    after = after[after.index("rollout:") :]
    (tmp_path / "x.yaml").write_text(f"{before}{text}\n{after}", encoding="utf-8")
    reward = load_config(tmp_path / "x.yaml").reward
    assert reward is not None and reward.public
    assert reward.model_dump(exclude_unset=True, mode="json") == yaml.safe_load(text)["reward"]


def test_several_rewards_are_explained_by_the_page_and_by_the_message() -> None:
    rewards = [yaml.safe_load(text)["reward"] for text in explained_rewards()]
    assert [reward.get("weights") for reward in rewards].count({"hps": 15.0, "MQ": 2.0}) == 2


METHODS = ("dense_process", "full_chain", "draft_k", "draft_lv", "alignprop", "refl", "drtune", "leapalign",
           "instructvideo", "vader")  # fmt: skip
WORLDS = ("tiny", "wan2.1-1.3b", "wan2.1-14b")
WORDS = {  # of a header: the keys that it means
    "objective": "objective", "reward": "reward", "run folder": "run", "stride": "rollout.stride",
    "reuse": "rollout.gradients_per_rollout", "clips": "data",
}  # fmt: skip


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_differs_from_prfl_in_what_its_header_says(world: str, method: str) -> None:
    """And a regulariser is no part of a method: in ``objective`` only the method's own keys differ."""
    folder = REPOSITORY / "configs" / world
    header = (folder / f"{method}.yaml").read_text().split("# Command:")[0]
    (listed,) = re.findall(r"Everything but ([a-z, ]+) is as in prfl.yaml", header)
    named = {WORDS[word] for word in re.split(", | and ", listed)}
    own, prfl = (keys_of(load_config(folder / f"{name}.yaml")) for name in (method, "prfl"))
    differing = {key for key in own.keys() | prfl.keys() if own.get(key) != prfl.get(key)}
    assert {key for key in differing if not any(f"{key}.".startswith(f"{each}.") for each in named)} == set()
    assert all(any(f"{key}.".startswith(f"{each}.") for key in differing) for each in named), "named, and the same"
    assert not {key for key in differing if key.startswith(("objective.sft", "objective.distance"))}


def keys_of(config: Config) -> dict[str, object]:
    """Every value of a config by its dotted key."""

    def walk(value: object, path: str) -> Iterator[tuple[str, object]]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from walk(inner, f"{path}.{name}" if path else name)
        else:
            yield path, value

    return dict(walk(config.model_dump(), ""))


def test_configs_ship() -> None:
    assert {"tiny.yaml", "reward.yaml", "prfl.yaml", "vader.yaml", "sft.yaml"} <= {path.name for path in SHIPPED}


def properties(schema: object, path: str = "") -> Iterator[tuple[str, dict]]:
    """Every key of a JSON schema, wherever it is nested, with what the schema says of it."""
    if isinstance(schema, dict):
        for name, value in schema.get("properties", {}).items():
            yield f"{path}.{name}", value
        for name, value in schema.items():
            yield from properties(value, f"{path}.{name}")
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            yield from properties(value, f"{path}[{index}]")


def test_the_json_schema_describes_every_key() -> None:
    found = dict(properties(json_schema()))
    assert {".$defs.TrainingConfig.steps", ".$defs.SftRegulariserConfig.every", ".$defs.StagesConfig.stages"} <= set(
        found
    )
    for path, value in found.items():
        assert len(value.get("description", "").split()) >= 3, f"{path} says too little"


def test_the_json_schema_knows_no_other_keys() -> None:
    sections = json_schema()["$defs"]
    assert all(section["additionalProperties"] is False for section in sections.values()), "a typing mistake is marked"
