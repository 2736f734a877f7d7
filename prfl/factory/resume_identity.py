"""What lies behind the paths and names of a config."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from prfl.backbone import Backbone
from prfl.backbone.condition import identified
from prfl.backbone.network import fingerprints
from prfl.config.schema import Config
from prfl.config.section import Source
from prfl.factory.critic import critic_folder
from prfl.factory.data import Dataset
from prfl.factory.experts import INIT
from prfl.factory.prompts import load_prompts
from prfl.factory.reward import reward_path
from prfl.reward.checkpoint import saved_reward
from prfl.training.checkpoint import VERSION
from prfl.utils.errors import AbsentError
from prfl.utils.hashing import remembered_hash


def input_contents(config: Config, model: Backbone, clips: Dataset | None) -> dict[str, Any]:
    """What lies behind the paths and names of a config, for a checkpoint's identity: a run that is resumed after its
    reward was trained again, say, would be another run under the same config.  The places themselves are not in it:
    what is there may be moved."""
    facts: dict[str, Any] = {VERSION: 2}
    facts |= {f"backbone.model ({part})": weights for part, weights in fingerprints(model).items()}
    facts["backbone.model (settings)"] = [model.facts.settings, *model.facts.schedule]
    facts["backbone.model (text encoder)"] = model.facts.text_identity or f"of {config.backbone.model}"  # a hub id
    prompts = "\n".join(identified(prompt) for prompt in load_prompts(config.data)["train"])
    facts["data.prompts.train (content)"] = hashlib.sha256(prompts.encode()).hexdigest()[:16]
    if clips is not None:
        facts["data (videos and labels)"] = clips.fingerprint
    sources: list[Source] = config.reward.files() if config.reward else []
    sources += [source for source in config.backbone.files() if source.key.startswith(INIT)]
    for number, source in enumerate(sources):
        several = [other.key for other in sources].count(source.key) > 1
        facts |= _source_contents(source, f"{source.key}[{number}]" if several else source.key)
    return facts


def _source_contents(source: Source, key: str) -> dict[str, Any]:
    """Return hashes of the content of a source: a file, a model's folder or a saved reward."""
    if source.kind == "reward":
        return {f"{key} ({name})": value for name, value in saved_reward(reward_path(source.target)).items()}
    if source.kind in ("model", "folder"):
        return {f"{key} (content)": _folder_content(str(critic_folder(source.target)))}
    if not Path(source.target).is_file():
        path = Path(source.target)
        raise AbsentError(f"there is no such file: {path}", path=path, where=key, fix=source.remedy)
    return {f"{key} (content)": remembered_hash(Path(source.target))[:16]}


def former_input_contents(clips: Dataset | None) -> dict[str, Any]:
    """Return the facts that checkpoints of older versions hold in place of some of ``input_contents``."""
    return {} if clips is None else {"data (clips and labels)": clips.former_fingerprint}


def _folder_content(source: str) -> str:
    """A hash of the files in a model's folder; of a model on the hub, its id."""
    files = sorted(file for file in Path(source).glob("*") if file.is_file())
    hashes = "".join(f"{file.name} {remembered_hash(file)}\n" for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16] if files else f"of {source}"
