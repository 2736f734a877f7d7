"""Saved rewards whose config was edited, or comes from a stranger."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.faults.planting import fault

HEAD = Path("heads/latent/config.json")


def edited(change: Callable[[dict], None], path: Path = HEAD, hashed: bool = False) -> None:
    """The config with other values; without a hash, as older rewards are, or with the one that it was saved with."""
    config = json.loads(path.read_text())
    change(config)
    if not hashed:
        del config["config_sha256"]
    path.write_text(json.dumps(config))


@fault("a head's config that was edited", "heads/latent/config.json: was edited since the reward was saved", "again")
def _(bench):
    edited(lambda config: config["normalisation"]["std"].update(light=2.0), hashed=True)
    return bench.cli("train", "prfl.yaml")


@fault("a deviation below zero", "config.json: normalisation.std.light: should be greater than 0, got -1")
def _(bench):
    edited(lambda config: config["normalisation"]["std"].update(light=-1.0))
    return bench.cli("train", "prfl.yaml")


@fault("a head of a million queries", "head.mlp.0.bias is (8388608,) by the config, and (8,) F32 in the file")
def _(bench):
    edited(lambda config: config["head"].update(n_queries=2**20))
    return bench.cli("train", "prfl.yaml")


@fault("a head of absurd width", "config.json: head.hidden: should be less than or equal to 1048576, got 10000000")
def _(bench):
    edited(lambda config: config["head"].update(hidden=10_000_000))
    return bench.cli("train", "prfl.yaml")


@fault("a head's adapter of a million ranks", "adapter.blocks.0.attn1.to_k.lora_A.weight is (1000000, 24)", "absent")
def _(bench):
    own = {"rank": 1_000_000, "alpha": 1.0, "targets": ["to_k"]}
    edited(lambda config: config.update(adapter=own))
    return bench.cli("train", "prfl.yaml")


@fault("a pixel reward of absurd size", "config.json: network.size: should be less than or equal to 4096")
def _(bench):
    edited(lambda config: config["network"].update(size=10**6), Path("heads/pixel/config.json"))
    return bench.cli("train", "vader.yaml")


@fault("a key that no head has", "config.json: head.temperature: unknown key")
def _(bench):
    edited(lambda config: config["head"].update(temperature=1.0))
    return bench.cli("score", "clips/0.mp4", "--head", "heads/latent", "--prompt", "a", "--model", str(bench.model))


@fault("a config of a hundred megabytes", "config.json: has", "bytes, which no config has")
def _(bench):
    HEAD.write_text(HEAD.read_text() + " " * 2**23)
    return bench.cli("train", "prfl.yaml")
