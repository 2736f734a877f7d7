"""Wan 2.1, image to video: what a first frame becomes, and the models of its pipeline that are refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from prfl.backbone import Ask, backbone_from_pipeline, load_architecture, load_backbone
from prfl.backbone.condition import stand_in, unconditional, with_unconditional
from prfl.backbone.first_frame import FRAME
from prfl.backbone.wan.image_to_video import MASK, TOKENS, WanImageBackbone
from prfl.utils.errors import PrflError
from prfl.utils.pictures import fitted, read_picture, write_picture
from tests.wan_image import CLIP, SHAPE, first_frames, save_tiny_wan_image

PROMPTS = ["a red circle", "a blue square moves left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan_image(tmp_path_factory.mktemp("models") / "tiny-i2v")


@pytest.fixture
def model(folder: Path) -> WanImageBackbone:
    backbone = load_backbone(folder)
    assert isinstance(backbone, WanImageBackbone)
    return backbone


@pytest.fixture
def asks(folder: Path) -> list[Ask]:
    return first_frames(folder.parent / "pictures", PROMPTS)


# ------------------------------------------------------------------------------------------------- asks


def test_an_ask_is_its_prompt_and_what_is_beside_it(asks: list[Ask]) -> None:
    first, other = asks[0], Ask(PROMPTS[0], asks[1].image, CLIP)
    assert Ask("a") == "a" and hash(Ask("a")) == hash("a") and {"a": 1}[Ask("a")] == 1
    assert first != PROMPTS[0] and PROMPTS[0] != first and first != other
    assert f"{first}" == first.prompt == PROMPTS[0] and json.loads(json.dumps([first])) == [PROMPTS[0]]
    assert first == Ask(PROMPTS[0], first.image, CLIP) != Ask(PROMPTS[0], first.image, replace(CLIP, frames=5))
    for copy in (pickle.loads(pickle.dumps(first)), deepcopy(first)):
        assert copy == first and copy.image == first.image and copy.clip == CLIP
    assert unconditional([first, "a"]) == [Ask("", first.image, CLIP), ""]
    assert with_unconditional(["a", "b"]) == ["", "a", "b"] and len(with_unconditional([first, other])) == 4


# ------------------------------------------------------------------------------------------------- conditions


def test_the_condition_is_the_pipelines(model: WanImageBackbone, folder: Path, asks: list[Ask]) -> None:
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    condition = model.condition(asks)
    for row, ask in enumerate(asks):
        picture = Image.open(str(ask.image))
        pixels = pipe.video_processor.preprocess(picture, height=16, width=16)
        _, beside = pipe.prepare_latents(pixels, 1, SHAPE[0], 16, 16, 9, torch.float32, "cpu")
        mask = condition.tensors[MASK][row].expand(-1, -1, 4, 4)
        torch.testing.assert_close(torch.cat([mask, condition.tensors[FRAME][row]]), beside[0])
        torch.testing.assert_close(condition.tensors[TOKENS][row], pipe.encode_image(picture)[0])


def test_the_unconditional_branch_keeps_the_image(model: WanImageBackbone, asks: list[Ask]) -> None:
    condition, empty = model.condition(asks), model.condition(unconditional(asks))
    for name in (FRAME, MASK, TOKENS):
        assert torch.equal(condition.tensors[name], empty.tensors[name])
    assert empty.tensors["lengths"].tolist() == [1, 1]


def test_both_parts_of_the_image_matter(model: WanImageBackbone, asks: list[Ask]) -> None:
    noise, sigma = torch.randn(1, *SHAPE), torch.tensor(0.7)
    condition, other = (model.condition([Ask(PROMPTS[0], ask.image, CLIP)]) for ask in asks)
    velocity = model.velocity(noise, sigma, condition)
    for name in (FRAME, TOKENS):
        changed = replace(condition, tensors={**condition.tensors, name: other.tensors[name]})
        assert (model.velocity(noise, sigma, changed) - velocity).abs().max() > 1e-3


def test_a_frame_is_encoded_once_for_the_asks_behind_each_other(
    model: WanImageBackbone, asks: list[Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[torch.Size] = []
    monkeypatch.setattr(model, "encode", lambda x, encode=model.encode: (encoded.append(x.shape), encode(x))[1])
    every = with_unconditional([asks[0], Ask("other", asks[0].image, CLIP), asks[1]])
    model.condition(every)
    assert len(encoded) == 2 and model.condition([every[0]]).asks == (every[0],)


def test_a_picture_of_another_size_is_scaled_and_cut(tmp_path: Path, model: WanImageBackbone) -> None:
    wide = torch.rand(3, 32, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_picture(tmp_path / "wide.png", wide)
    write_picture(tmp_path / "cut.png", fitted(wide, 16, 16))
    whole, cut = (model.condition([Ask("a", tmp_path / name, CLIP)]).tensors for name in ("wide.png", "cut.png"))
    torch.testing.assert_close(whole[FRAME], cut[FRAME], rtol=0, atol=0.05)  # 8 bits a channel between them
    levels = read_picture(tmp_path / "cut.png")
    write_picture(tmp_path / "again.png", levels)
    assert torch.equal(read_picture(tmp_path / "again.png"), levels)


def test_a_photograph_is_read_as_it_is_shown(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 128))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "a.png", exif=exif)
    assert read_picture(tmp_path / "a.png").shape == (3, 4, 2)


# ------------------------------------------------------------------------------------------------- refusals


def test_asks_without_what_the_model_needs(
    model: WanImageBackbone, asks: list[Ask], tiny_pipeline_folder: Path
) -> None:
    for ask in (PROMPTS[0], "", Ask(PROMPTS[0], asks[0].image)):
        with pytest.raises(PrflError, match="needs a first frame"):
            model.condition([ask])
    with pytest.raises(PrflError, match=r"takes no first frame.*first-0\.png"):
        load_backbone(tiny_pipeline_folder).condition(asks)
    with pytest.raises(PrflError, match="a height of 18"):
        model.condition([Ask("a", asks[0].image, replace(CLIP, height=18))])


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_pictures_that_are_none(model: WanImageBackbone, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PrflError, match=r"a\.png"):
        model.condition([Ask("a", path, CLIP)])
    with pytest.raises(PrflError, match=r"a\.mp4: there is no such file"):
        model.condition([Ask("a", tmp_path / "a.mp4", CLIP)])


def test_latents_of_another_size_than_the_condition(model: WanImageBackbone, asks: list[Ask]) -> None:
    with pytest.raises(PrflError, match="3 x 4 x 4 latents, and these are 2 x 4 x 4"):
        model.velocity(torch.randn(1, 4, 2, 4, 4), torch.tensor(0.5), model.condition(asks[:1]))


@pytest.mark.parametrize(
    ("index", "changes", "named"),
    [
        ({"expand_timesteps": True}, {}, "does not take the first frame in the place"),
        ({}, {"image_dim": None, "added_kv_proj_dim": None}, r"Wan 2\.2 I2V"),
        ({}, {"pos_embed_seq_len": 10}, "FLF2V"),
        ({}, {"in_channels": 9}, "reads 9 channels, not 4 and 8"),
        ({"boundary_ratio": 0.9}, {}, "two transformers"),
    ],
)
def test_other_models_of_the_pipeline(tmp_path: Path, index: dict, changes: dict, named: str) -> None:
    with pytest.raises(PrflError, match=named):
        load_backbone(save_tiny_wan_image(tmp_path / "other", index=index, **changes))


def test_parts_that_are_missing(model: WanImageBackbone, tmp_path: Path, asks: list[Ask]) -> None:
    folder = save_tiny_wan_image(tmp_path / "whole")
    (folder / "image_encoder/model.safetensors").unlink()
    with pytest.raises(PrflError, match="cannot load the image encoder"):
        load_backbone(folder).condition(asks)
    (folder / "image_encoder/config.json").unlink()
    with pytest.raises(PrflError, match="cannot load the image encoder"):
        load_backbone(folder)


# ------------------------------------------------------------------------------------------------- without weights


def test_its_shapes_without_weights(model: WanImageBackbone, folder: Path, asks: list[Ask]) -> None:
    empty, condition = load_architecture(folder), model.condition(asks)
    assert sum(p.numel() for p in empty.text.encoder().parameters()) == sum(
        p.numel() for p in model.text.encoder().parameters()
    )
    tokens = condition.tensors["prompt_embeds"].shape[1]
    made = stand_in(empty.facts.condition, 2, tokens, SHAPE, lambda shape: torch.empty(shape, device="meta"))
    assert {n: t.shape for n, t in made.tensors.items()} == {n: t.shape for n, t in condition.tensors.items()}
    noise = torch.empty(2, *SHAPE, device="meta")
    assert empty.velocity(noise, torch.empty(2, device="meta"), made.to("meta")).shape == noise.shape


def test_the_model_of_a_pipeline_that_is_loaded(model: WanImageBackbone, folder: Path, asks: list[Ask]) -> None:
    ours = backbone_from_pipeline(WanImageToVideoPipeline.from_pretrained(folder))
    noise, sigma = torch.randn(2, *SHAPE), torch.tensor(0.5)
    theirs = model.velocity(noise, sigma, model.condition(asks))
    torch.testing.assert_close(ours.velocity(noise, sigma, ours.condition(asks)), theirs)


def test_the_text_and_image_encoders_are_freed_together(model: WanImageBackbone, asks: list[Ask]) -> None:
    loads: list[str] = []
    load: Callable = model.text._load_image
    model.text._load_image = lambda: (loads.append("image"), load())[1]  # type: ignore[method-assign]
    model.condition(asks)
    model.text.free()
    model.condition(asks)
    assert loads == ["image", "image"]
