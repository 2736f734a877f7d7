"""What cannot be loaded says so: missing parts, pickles, and models of another kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from prfl.backbone import Condition, load_backbone
from prfl.backbone.network import add_copy
from prfl.backbone.wan.text import text_condition
from prfl.data.cache import LatentCache
from prfl.data.conditions import remember
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder", "nowhere"])
def test_a_missing_model(name: str) -> None:
    with pytest.raises(PrflError, match="no such folder|no folder here"):
        load_backbone(name)


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler"])
def test_a_missing_part(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(PrflError, match=f"cannot load the {part}"):
        load_backbone(folder)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_the_text_encoder_is_loaded_when_it_is_needed(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    backbone = load_backbone(folder)
    condition = text_condition(torch.randn(2, 3, 16), torch.tensor([3, 2]))
    assert backbone.velocity(torch.randn(2, 4, 1, 2, 2), torch.tensor(0.5), condition).isfinite().all()
    with pytest.raises(PrflError, match="text encoder or tokenizer"):
        backbone.condition(["a"])


def test_the_text_encoder_can_be_dropped(folder: Path) -> None:
    backbone = load_backbone(folder)
    first = backbone.condition(["a red circle"])
    encoder = backbone.text.encoder()
    backbone.text.free()
    assert torch.equal(backbone.condition(["a red circle"]).tensors["prompt_embeds"], first.tensors["prompt_embeds"])
    assert backbone.text.encoder() is not encoder


def test_remembered_prompts_need_no_text_encoder(folder: Path) -> None:
    backbone = load_backbone(folder)
    prompts = ["a red circle", "a blue square that moves", ""]
    alone = [backbone.condition([prompt]) for prompt in prompts]
    remember(backbone, prompts)
    shutil.rmtree(folder / "text_encoder")
    together = backbone.condition([prompts[1], "", prompts[0]])
    assert torch.equal(
        together.tensors["prompt_embeds"], Condition.cat([alone[1], alone[2], alone[0]]).tensors["prompt_embeds"]
    )
    with pytest.raises(PrflError, match="text encoder"):
        backbone.condition([prompts[0], "another prompt"])


def test_another_text_encoder_has_another_identity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_backbone(folder)
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name] + 1
    save_file(tensors, weights, metadata={"format": "pt"})
    after = load_backbone(folder)
    assert before.facts.text_identity != after.facts.text_identity and before.facts.identity == after.facts.identity
    caches = [LatentCache.for_backbone(some, folder, VideoSize(5, 16, 16, 8)) for some in (before, after)]
    assert caches[0].prompt_file("a") != caches[1].prompt_file("a"), "embeddings of the old one would be found"
    after.facts = replace(after.facts, text_tokens=64)
    shorter = LatentCache.for_backbone(after, folder, VideoSize(5, 16, 16, 8))
    assert shorter.prompt_file("a") != caches[1].prompt_file("a"), "nor of prompts that were cut elsewhere"


def test_pickled_weights_are_refused(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(PrflError, match="cannot load the transformer"):
        load_backbone(folder)


def test_pipelines_of_another_kind(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(PrflError, match="not supported.*\n?.*give a model of one of WanPipeline"):
        load_backbone(folder)


def test_image_to_video_transformers(make_tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    for name, changes in (("a", {"image_dim": 8, "added_kv_proj_dim": 24}), ("b", {"in_channels": 9})):
        with pytest.raises(PrflError, match="image-to-video"):
            load_backbone(make_tiny_pipeline(tmp_path / name, **changes))


def test_a_vae_whose_config_lies_about_its_factors(folder: Path) -> None:
    edit(folder / "vae" / "config.json", scale_factor_spatial=8)
    with pytest.raises(PrflError, match="factors of"):
        load_backbone(folder)


def test_a_scheduler_of_another_kind(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**{k: v for k, v in config.items() if k != "shift"}, "flow_shift": 5.0}))
    assert load_backbone(folder).facts.shift == 5.0  # UniPC's name for it
    path.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(PrflError, match="flow-matching"):
        load_backbone(folder)


def test_the_transformer_makes_room_for_the_text_encoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(folder)
    add_copy(backbone, "policy")
    before = list(backbone.transformer.parameters())
    seen: list[str] = []
    networks = {id(backbone.transformer): "base", id(backbone.networks["policy/transformer"]): "copy"}
    move, load = type(backbone.transformer).to, backbone.text._load
    monkeypatch.setattr(
        type(backbone.transformer),
        "to",
        lambda self, where: (seen.append(f"{networks[id(self)]} to {where}"), move(self, where))[1],
    )
    backbone.text._load = lambda: (seen.append("load"), load())[1]
    remember(backbone, ["a", "a red circle"])
    assert seen == ["base to cpu", "copy to cpu", "load", "base to cpu", "copy to cpu"], "the device is a CPU here"
    assert all(a is b for a, b in zip(backbone.transformer.parameters(), before, strict=True))
    remember(backbone, ["a"])
    assert len(seen) == 5, "nothing new to encode"


def test_the_libraries_bars_are_not_shown(tiny_pipeline_folder: Path, capfd: pytest.CaptureFixture) -> None:
    """They break ours; and they are as they were afterwards."""
    logging.enable_progress_bar()
    load_backbone(tiny_pipeline_folder).condition(["a red circle"])  # which loads the text encoder
    assert logging.is_progress_bar_enabled()
    assert capfd.readouterr().err == ""
