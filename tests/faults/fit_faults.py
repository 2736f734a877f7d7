"""Parts that do not fit together: heads, models, sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prfl.backbone import load_backbone
from prfl.data.dataset import load_dataset
from prfl.utils.video_size import VideoSize
from tests.faults.planting import fault
from tests.faults.project import CLIP
from tests.tiny import save_tiny_pipeline


@fault("a head for a model with other blocks", "does not fit this backbone", "num_blocks: 3 there, 4 here", "load")
def _(bench):
    return bench.cli("train", "prfl.yaml", bench.other_model(num_layers=4))


@fault("a head for a model with other weights", "transformer_fingerprint", "or train a reward here")
def _(bench):
    return bench.cli("train", "prfl.yaml", bench.other_model())


@fault("a head for other latent statistics", "does not fit", "latents_std")
def _(bench):
    path = bench.copied_model() / "vae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "latents_std": [1.0, 1.0, 1.0, 1.0]}))
    return bench.cli("train", "prfl.yaml", "backbone.model=model")


@fault("a head for another sigma convention", "heads/latent: the reward does not fit", "sigma_convention")
def _(bench):
    path = Path("heads/latent/config.json")
    config = json.loads(path.read_text())
    config["backbone"]["sigma_convention"] = "x = sigma x0 + (1 - sigma) noise"
    path.write_text(json.dumps(config))
    return bench.cli("train", "prfl.yaml")


@fault("a head for another frame rate", "prfl.yaml: data.fps: 16, but", "with 8", "data.fps: 8, or train")
def _(bench):
    return bench.cli("train", "prfl.yaml", "data.fps=16")


@fault("a head for another resolution", "prfl.yaml: data.height: 32, but", "height: 16")
def _(bench):
    return bench.cli("train", "prfl.yaml", "data.height=32")


@fault("a weight on a score that the reward lacks", "prfl.yaml: reward.weights", "no such", "speed", "light, calm")
def _(bench):
    # It is said before a model is built, and clips go through its VAE.
    bench.patch.setattr("prfl.runs.stage.prepared_model", lambda config: pytest.fail("a model was built"))
    return bench.cli("train", "prfl.yaml", "reward.weights={speed: 1}")


@fault("a pixel reward given as a latent one", "prfl.yaml: reward.space", "is a pixel one", "space: pixel")
def _(bench):
    return bench.cli("train", "prfl.yaml", "reward.path=heads/pixel")


@fault("a pixel reward given as the latent one beside", "vader.yaml: reward.latent", "is a pixel one", "reward.path")
def _(bench):
    return bench.cli("train", "vader.yaml", "reward.latent=heads/pixel")


@fault(
    "a cache made for another model", "4 videos are not in the cache for this model", "4 entries are of", "prfl cache"
)
def _(bench):
    other = load_backbone(save_tiny_pipeline(bench.folder / "other", seed=1))
    return bench.call(load_dataset, other, "manifest.jsonl", "cache", VideoSize(**CLIP))
