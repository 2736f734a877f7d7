"""The cache of a config's clips and prompts, filled before training."""

from __future__ import annotations

from prfl import factory
from prfl.config.schema import Config, PreferenceConfig
from prfl.runs.outcomes import prompts_of
from prfl.utils.console import console, progress


def cache(config: Config) -> None:
    """Encode the config's clips and prompts."""
    model = factory.backbone(config)
    factory.check_prompts(config, model)
    if factory.has_clips(config):
        factory.fill_cache(config, model, progress("generated clips"))
    if not isinstance(config.objective, PreferenceConfig):  # which reads its clips' prompts alone
        encoded = factory.remember(config, model, prompts_of(config), progress("encoding the prompts"))
        console.print(f"{encoded} prompts encoded that no clip has", markup=False)
