"""What lies behind the paths and names of a config."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from prfl.backbone import Backbone
from prfl.config.schema import Config, PixelRewardConfig, listed
from prfl.factory.data import Dataset, load_prompts
from prfl.factory.reward import reward_path
from prfl.reward.aesthetic import AESTHETIC_MLP
from prfl.reward.checkpoint import saved_reward
from prfl.training.checkpoint import VERSION
from prfl.utils.errors import PrflError
from prfl.utils.hashing import remembered_hash


def input_contents(config: Config, model: Backbone, clips: Dataset | None) -> dict[str, Any]:
    """What lies behind the paths and names of a config, for a checkpoint's identity: a run that is resumed after its
    reward was trained again, say, would be another run under the same config.  The places themselves are not in it:
    what is there may be moved."""
    made_by = model.describe()
    facts: dict[str, Any] = {VERSION: 2} | {
        f"backbone.model ({part})": made_by[f"{part}_fingerprint"] for part in ("transformer", "vae")
    }
    facts["backbone.model (settings)"] = [model.settings, *model.schedule]
    facts["backbone.model (text encoder)"] = model.text_identity or f"of {config.backbone.model}"  # a hub id
    some = "\n".join(load_prompts(config.data.prompts)["train"])
    facts["data.prompts.train (content)"] = hashlib.sha256(some.encode()).hexdigest()[:16]
    if clips is not None:
        facts["data (videos and labels)"] = clips.fingerprint
    paths = listed(config.reward.path) if config.reward else []
    for number, path in enumerate(paths):
        key = f"reward.path[{number}]" if len(paths) > 1 else "reward.path"
        facts |= {f"{key} ({name})": value for name, value in saved_reward(reward_path(path)).items()}
    if isinstance(config.reward, PixelRewardConfig) and config.reward.aesthetic:
        if not config.reward.aesthetic.mlp.is_file():
            what = f"there is no file {config.reward.aesthetic.mlp}"
            raise PrflError(what, where="reward.aesthetic.mlp", fix=AESTHETIC_MLP)
        facts["reward.aesthetic.mlp (content)"] = remembered_hash(config.reward.aesthetic.mlp)[:16]
        facts["reward.aesthetic.clip (content)"] = _folder_content(config.reward.aesthetic.clip)
    return facts


def former_input_contents(clips: Dataset | None) -> dict[str, Any]:
    """What checkpoints of older versions hold in place of some of ``contents``."""
    return {} if clips is None else {"data (clips and labels)": clips.former_fingerprint}


def _folder_content(place: str) -> str:
    """A hash of the files in a model's folder; of a model on the hub, its id."""
    files = sorted(file for file in Path(place).glob("*") if file.is_file())
    hashes = "".join(f"{file.name} {remembered_hash(file)}\n" for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16] if files else f"of {place}"
