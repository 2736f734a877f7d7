"""The prompts of a config."""

from __future__ import annotations

from prfl.backbone import Backbone
from prfl.config.schema import Config
from prfl.config.sections.data import PromptsConfig
from prfl.data import leaks
from prfl.data.prompts import read_prompts, split_prompts
from prfl.toy import renderer
from prfl.utils.errors import PrflError, error_location


def load_prompts(config: PromptsConfig) -> dict[str, list[str]]:
    """``train``, and ``validation`` and ``test`` where they are given; no prompt is in two of them.

    A file that is named for several sets is split among them, once and for all (``split_prompts``).
    """
    named = {"train": config.train, "validation": config.validation, "test": config.test}
    splits: dict[str, list[str]] = {}
    for name, source in named.items():
        if source is None or name in splits:
            continue
        if source == "shapes":
            splits[name] = renderer.split_prompts()[name]
            continue
        with error_location(f"data.prompts.{name}"):
            splits |= split_prompts(read_prompts(source), [other for other in named if named[other] == source])
    owner: dict[str, str] = {}
    for name, prompts in splits.items():
        for prompt in prompts:
            if owner.setdefault(prompt, name) != name:
                raise PrflError(
                    f"the prompt {prompt[:80]!r} is in {owner[prompt]} too",
                    where=f"data.prompts.{name}",
                    fix="give each prompt to one set",
                )
    return splits


def check_prompts(config: Config, model: Backbone) -> None:
    """Raises PrflError for prompts of two sets that are one to the text encoder, and warns of what else is alike."""
    leaks.check_prompts(load_prompts(config.data.prompts), "data.prompts", model)
