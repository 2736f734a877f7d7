"""Models on the meta device: the same parts as the loaded ones, without their weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from prfl.backbone import load_architecture, load_backbone
from prfl.backbone.wan.family import WAN
from prfl.backbone.wan.model import WanBackbone
from prfl.backbone.wan.text import text_condition
from prfl.utils.errors import PrflError

SMALL, LARGE, _ = WAN.shipped


def layout(module: nn.Module) -> dict[str, tuple]:
    both = [*module.named_parameters(), *module.named_buffers()]
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in both}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_has_every_tensor_of_the_loaded_model(tiny_pipeline_folder: Path, dtype: torch.dtype) -> None:
    loaded, empty = load_backbone(tiny_pipeline_folder, dtype), load_architecture(tiny_pipeline_folder, dtype)
    parts = {"text_encoder": (loaded.text.encoder(), empty.text.encoder())}
    parts |= {name: (loaded.networks[name], empty.networks[name]) for name in ("transformer", "vae")}
    for part, (with_weights, without) in parts.items():
        assert layout(without) == layout(with_weights), part
        assert all(tensor.is_meta for tensor in without.parameters()), part
    same = {name: value for name, value in loaded.facts.identity.items() if not name.endswith("fingerprint")}
    assert same.items() <= empty.facts.identity.items()


def test_the_published_models_ship() -> None:
    """Parameters as published: 1.42 and 14.3 billion in the transformers, 5.68 in the encoder."""
    for name, parameters, blocks, width in ((SMALL, 1_418_996_800, 30, 1536), (LARGE, 14_288_491_584, 40, 5120)):
        model = load_architecture(name, torch.bfloat16)
        assert sum(p.numel() for p in model.transformer.parameters()) == parameters
        assert (model.facts.num_blocks, model.facts.widths[0], model.facts.shift) == (blocks, width, 3.0)
        assert model.latent_shape(81, 720, 1280) == (16, 21, 90, 160)
        assert sum(p.numel() for p in model.vae.parameters()) == 126_892_531
        assert sum(p.numel() for p in model.text.encoder().parameters()) == 5_680_910_336


def test_a_model_that_does_not_ship_and_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PrflError, match="someone/something: no folder here, not in the hub.s cache"):
        load_architecture("someone/something")


@pytest.fixture
def random_wan() -> Callable[[str], WanBackbone]:
    """A shipped architecture in bfloat16 with random weights: the real size, no download."""

    def build(name: str) -> WanBackbone:
        model = load_architecture(name, torch.bfloat16)
        noise = 0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
        model.transformer.to_empty(device="cpu")
        for parameter in model.transformer.parameters():
            flat = parameter.data.view(-1)
            for start in range(0, len(flat), len(noise)):
                part = flat[start : start + len(noise)]
                part.copy_(noise[: len(part)])
        for buffer_name, buffer in type(model.transformer.rope)(128, (1, 2, 2), 1024).named_buffers():
            model.transformer.rope.get_buffer(buffer_name).copy_(buffer)
        return model

    return build


@pytest.mark.slow
@pytest.mark.skipif("PRFL_SLOW_TESTS" not in os.environ, reason="half a minute; set PRFL_SLOW_TESTS to run it")
@pytest.mark.skipif(psutil.virtual_memory().available < 6 << 30, reason="2.8 GB of weights, and room to compute")
def test_wan_of_its_real_size_computes(random_wan: Callable[[str], WanBackbone]) -> None:
    model = random_wan(SMALL)
    latents = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    condition = text_condition(torch.zeros(1, 4, 4096, dtype=torch.bfloat16), torch.tensor([4]))
    with torch.no_grad():
        velocity = model.velocity(latents, torch.tensor(0.7), condition)
    assert velocity.shape == latents.shape and velocity.isfinite().all() and velocity.std() > 0
