"""The memory of configs that differ in a few keys: what is built on ``meta`` for one serves the next."""

from __future__ import annotations

from typing import Any, TypeVar

from prfl.config.schema import Config
from prfl.config.section import Section
from prfl.estimate.memory import RunOnMeta
from prfl.factory.backbone import build_architecture

S = TypeVar("S", bound=Section)

# Keys that neither the model nor the reward is built by, but for what is kept for the backward pass, which is set anew.
MEASURED_KEYS = {
    "backbone.checkpointing": "full",
    "backbone.offload": False,
    "training.accumulation": 1,
    "reward.batch": None,
    "evaluation.batch": 1,
    "data.encode_batch": 1,
}
REMEMBERED = 2  # the config that others are tried beside, and one of another model


def with_keys(section: S, changes: dict[str, Any]) -> S:
    """Return a copy in which the keys at these yaml paths are changed."""
    update: dict[str, Any] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        update[name] = with_keys(update.get(name, getattr(section, name)), {rest: value}) if rest else value
    return section.model_copy(update=update)


class Variants:
    """Measures one config after another; a model that was built for a config like it is used again."""

    def __init__(self) -> None:
        self._built: list[tuple[Config, RunOnMeta]] = []  # each behind its config without the keys; the latest last

    def run(self, config: Config) -> RunOnMeta:
        """Return the run of a config, on ``meta``; ask for its memory before another's."""
        rest = _without_measured_keys(config)
        alike = next((pair for pair in self._built if pair[0] == rest), None)
        if alike is None:
            run = RunOnMeta.of(config, build_architecture(config))
        else:
            self._built.remove(alike)
            run = alike[1].changed_to(config)
        if config.backbone.train == "lora":  # a base that is trained is cast when it is measured
            self._built = [*self._built, (rest, run)][-REMEMBERED:]
        return run


def _without_measured_keys(config: Config) -> Config:
    keys = {key: value for key, value in MEASURED_KEYS.items() if config.reward or not key.startswith("reward.")}
    return with_keys(config, keys)
