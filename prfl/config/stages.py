"""Loads a file of stages, several configs that run in turn: ``stages: [tiny/reward.yaml, tiny/prfl.yaml]``.

A stage has the name of its file (``tiny/reward.yaml`` is ``reward``).  A later stage refers to an earlier one's run
folder as ``${stages.reward.run}``.  The trainer knows nothing of stages: each is a config of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prfl.config.extends import read_tree
from prfl.config.load import config_from, validate
from prfl.config.places import find_config
from prfl.config.schema import Config, StagesConfig
from prfl.utils.errors import PrflError
from prfl.utils.text import closest


@dataclass(frozen=True)
class Stage:
    name: str
    path: Path
    config: Config


def load_stages(path: str | Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """Load and validate all stages of a file, in order; a config without ``stages`` is a list of one stage.

    overrides: ``training.steps=10`` for an ordinary config, ``prfl.training.steps=10`` for the stage ``prfl``.
    Raises PrflError.
    """
    path = find_config(path)
    tree = read_tree(path)
    if "stages" not in tree.keys:
        return [Stage(path.stem, path, config_from(tree, overrides, stage_runs=None))]
    files = [path.parent / file for file in validate(StagesConfig, tree.keys, tree).stages]
    names = [file.stem for file in files]
    for name in names:
        if names.count(name) > 1:
            raise PrflError(f"two stages are called '{name}'", where=f"{path}: stages", fix="rename one of the files")
    of_stage = share_out(overrides, names)
    stages: list[Stage] = []
    for name, file in zip(names, files, strict=True):
        tree = read_tree(file)
        if "stages" in tree.keys:
            raise PrflError("a stage cannot have stages", where=f"{path}: stages: {file}", fix="list its stages here")
        runs = {stage.name: stage.config.run for stage in stages}
        config = config_from(tree, of_stage[name], runs)
        if config.run in runs.values():
            raise PrflError(
                f"an earlier stage has the run folder {config.run} too",
                where=f"{file}: run",
                fix="give each stage its own run",
            )
        stages.append(Stage(name, file, config))
    return stages


def share_out(overrides: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Sort overrides by their stage, and remove the stage's name in front.  Raises PrflError for an unknown stage."""
    of_stage: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        name, _, rest = override.partition(".")
        if name not in of_stage or "=" not in rest:
            close = closest(name, names) or names[-1]
            fix = f"{close}.{override if name not in names else 'training.steps=10'}"
            raise PrflError("names no stage", where=f"command line: {override}", fix=f"put a stage in front: {fix}")
        of_stage[name].append(rest)
    return of_stage
