"""Saved rewards and policies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.faults.planting import fault, lying


@fault("a reward whose config is no JSON", "heads/latent/config.json: is not JSON", "save or download")
def _(bench):
    path = Path("heads/latent/config.json")
    path.write_text(path.read_text()[:100])
    return bench.cli("train", "prfl.yaml")


@fault(
    "a reward whose weights were exchanged", "is not the file that config.json was written for", "download the reward"
)
def _(bench):
    lying(Path("heads/latent/reward.safetensors"))
    return bench.cli("train", "prfl.yaml")


@fault("a reward with a lying header and the right hash", "reward.safetensors: is damaged", "download the reward again")
def _(bench):
    path = Path("heads/latent/config.json")
    lied = hashlib.sha256(lying(Path("heads/latent/reward.safetensors"))).hexdigest()
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights_sha256": lied}))
    return bench.cli("train", "prfl.yaml")


@fault("a reward whose config does not fit its weights", "heads/latent: the config and the weights do not describe")
def _(bench):
    path = Path("heads/latent/config.json")
    config = json.loads(path.read_text())
    config["head"]["inner"] = 16
    path.write_text(json.dumps(config))
    return bench.cli("train", "prfl.yaml")


@fault("a trained policy that is truncated", "runs/sft/policy.safetensors: is damaged", "run `prfl train`")
def _(bench):
    path = Path("runs/sft/policy.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    return bench.cli("sample", "sft.yaml")
