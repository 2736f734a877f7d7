"""The cache of a config's clips and prompts, filled before training."""

from __future__ import annotations

from prfl.config.schema import Config
from prfl.factory.backbone import build_backbone
from prfl.factory.data import encode_prompts, fill_cache
from prfl.factory.prompts import check_prompts
from prfl.runs.outcomes import prompts_of
from prfl.utils.console import console, progress


def cache(config: Config) -> None:
    """Encode the config's clips and prompts."""
    model = build_backbone(config)
    check_prompts(config, model)
    if config.reads_clips:
        fill_cache(config, model, progress("generated clips"))
    if not config.trains_reward:  # which reads its clips' prompts alone
        encoded = encode_prompts(config, model, prompts_of(config), progress("encoding the prompts"))
        console.say(f"{encoded} prompts encoded that no clip has")
