"""The cache of a config's clips and prompts, filled before training."""

from __future__ import annotations

from prfl.config.schema import Config, PreferenceConfig
from prfl.factory.backbone import build_backbone
from prfl.factory.data import check_prompts, encode_prompts, fill_cache, has_clips
from prfl.runs.outcomes import prompts_of
from prfl.utils.console import console, progress


def cache(config: Config) -> None:
    """Encode the config's clips and prompts."""
    model = build_backbone(config)
    check_prompts(config, model)
    if has_clips(config):
        fill_cache(config, model, progress("generated clips"))
    if not isinstance(config.objective, PreferenceConfig):  # which reads its clips' prompts alone
        encoded = encode_prompts(config, model, prompts_of(config), progress("encoding the prompts"))
        console.print(f"{encoded} prompts encoded that no clip has", markup=False)
