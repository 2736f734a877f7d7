"""Shared fixtures: a random tiny Wan pipeline in the real diffusers folder format, and a backbone on it.

Heavy imports are inside the fixtures: the process that hands the tests out to others reads this file, and no more.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from prfl.backbone import Backbone


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Import what the tests have in common, without the garbage collector, which would find nothing.

    While jaxtyping's hook imports a module, all bytecode is looked for under another name: what such a module imports
    first would be compiled anew in a fresh environment, torch and diffusers too (11 s for each process).
    """
    gc.disable()
    if hasattr(session.config, "workerinput"):  # a process that runs all kinds of tests
        import accelerate  # noqa: F401
        import matplotlib.pyplot  # noqa: F401
        import peft  # noqa: F401
        from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: F401
        from transformers import UMT5EncoderModel  # noqa: F401


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look through it again, nor as often as it would."""
    gc.enable()
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def own_hashes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hashes that are remembered stay out of the user's cache folder."""
    os.environ["PRFL_HASHES"] = str(tmp_path_factory.mktemp("hashes") / "hashes.sqlite")


@pytest.fixture(scope="session", autouse=True)
def no_flushing() -> Iterator[None]:
    """Nothing waits for the disk: the files of a test need not outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def read_once() -> Iterator[None]:
    """Each process parses a config's text once, and reads once peft's version, which is asked for with each adapter."""
    import copy
    import importlib.metadata
    from functools import cache

    from prfl.config import strict_yaml

    parsed = cache(strict_yaml.parse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_yaml, "parse", lambda text, where: copy.deepcopy(parsed(text, where)))
        patch.setattr(importlib.metadata, "version", cache(importlib.metadata.version))
        yield


@pytest.fixture
def blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots of one pixel, for tests that train by the command line; one that is marked ``pictures`` draws them."""
    from tests import pictures

    if request.node.get_closest_marker("pictures") is None:
        pictures.leave_out(monkeypatch)


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: a random WanPipeline; 17 x 16 x 16 pixels are latents of (4, 5, 4, 4), 20 tokens."""
    from tests.tiny import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny-wan")


@pytest.fixture(scope="session")
def make_tiny_pipeline() -> Callable[..., Path]:
    """``save_tiny_pipeline(folder, seed=0, **transformer_changes)``, for tests that need another model."""
    from tests.tiny import save_tiny_pipeline

    return save_tiny_pipeline


@pytest.fixture
def tiny_run(tmp_path: Path, tiny_pipeline_folder: Path) -> Callable[..., Path]:
    """``tiny_run(targets=..., rank=4, alpha=2)``: the folder of a finished PRFL run whose adapter does something."""

    def make(**adapter) -> Path:
        import torch

        from prfl.config import dump_resolved
        from prfl.config.schema import Config
        from prfl.factory.backbone import POLICY, build_backbone
        from prfl.factory.policy import save_policy

        run = tmp_path / "runs" / "tiny-run"
        run.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            prompts = {"train": "a red circle\na blue square", "validation": "a green circle", "test": "a red square"}
            (tmp_path / f"{split}.txt").write_text(prompts[split])
        config = Config.model_validate(
            {
                "version": 1, "run": str(run), "seed": 0,
                "backbone": {"model": str(tiny_pipeline_folder), "adapter": {"rank": 4, "alpha": 2, **adapter}},
                "data": {
                    "prompts": {s: str(tmp_path / f"{s}.txt") for s in ("train", "validation", "test")},
                    "cache": str(tmp_path / "cache"), "frames": 5, "height": 16, "width": 16, "fps": 8,
                },
                "reward": {"space": "latent", "path": str(tmp_path / "reward")},
                "rollout": {"steps": 2}, "objective": {"name": "prfl"},
                "training": {"steps": 1, "batch": 1, "learning_rate": 1e-3},
                "evaluation": {"every": 0, "final_samples": 1},
            }
        )  # fmt: skip
        (run / "config.yaml").write_text(dump_resolved(config))
        model = build_backbone(config)
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters(POLICY).values()):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        save_policy(run, model, config)
        return run

    return make


@pytest.fixture(scope="session")
def loaded_tiny_backbone(tiny_pipeline_folder: Path) -> Backbone:
    """Read only: the model of that folder, with its text encoder."""
    from prfl.backbone import load_backbone

    model = load_backbone(tiny_pipeline_folder)
    model.condition([""])
    return model


@pytest.fixture
def tiny_backbone(loaded_tiny_backbone: Backbone) -> Backbone:
    """A fresh one per test, so that adapters added by one test are not seen by the next; a copy is made at once."""
    from tests.models import copied

    return copied(loaded_tiny_backbone)
