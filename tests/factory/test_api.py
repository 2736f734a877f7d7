"""What ``import prfl`` gives a notebook: a model, a reward on it, and both of a pipeline that is loaded already."""

from __future__ import annotations

from inspect import unwrap

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig

import prfl
from prfl.toy.clips import model_folder, reward_folder

PROMPT = "a red circle moves left quickly"


@pytest.fixture
def pipe() -> WanPipeline:
    return WanPipeline.from_pretrained(model_folder())


def test_the_shapes_by_their_name() -> None:
    backbone = prfl.load_backbone("shapes")
    reward = prfl.load_reward("shapes", backbone)
    latents = torch.randn(2, *backbone.latent_shape(17, 32, 32), generator=torch.Generator().manual_seed(0))
    of_folder = prfl.LatentReward.from_pretrained(reward_folder(), backbone, adapter_name="other")
    scores, others = reward.score(latents, 0.7, PROMPT), of_folder.score(latents, 0.7, PROMPT)
    assert len(scores) == 5 and all(torch.equal(scores[name], others[name]) for name in scores)


def test_a_pipeline_is_the_model_of_its_folder(pipe: WanPipeline) -> None:
    loaded, shared = prfl.load_backbone("shapes"), prfl.backbone_from_pipeline(pipe)
    assert shared.networks["transformer"] is pipe.transformer and shared.networks["vae"] is pipe.vae
    assert shared.facts == loaded.facts
    latents = torch.randn(1, *loaded.latent_shape(17, 32, 32), generator=torch.Generator().manual_seed(0))
    first, second = (b.velocity(latents, torch.tensor(0.7), b.condition([PROMPT])) for b in (loaded, shared))
    assert torch.equal(first, second)
    reward = prfl.load_reward("shapes", pipe)
    exact = prfl.load_reward("shapes", loaded).score(latents, 0.7, PROMPT)
    assert all(torch.equal(score, exact[name]) for name, score in reward.score(latents, 0.7, PROMPT).items())


def test_a_pipelines_lora_does_not_make_it_another_model(pipe: WanPipeline) -> None:
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    assert prfl.backbone_from_pipeline(pipe).facts == prfl.load_backbone("shapes").facts


def test_pipelines_that_hold_no_model(pipe: WanPipeline) -> None:
    pipe.transformer._hf_hook = object()
    with pytest.raises(prfl.PrflError, match=r"moves its transformer between devices[\s\S]*remove_all_hooks"):
        prfl.backbone_from_pipeline(pipe)
    del pipe.transformer._hf_hook
    pipe.text_encoder = None
    backbone = prfl.backbone_from_pipeline(pipe)
    with pytest.raises(prfl.PrflError, match=r"no text_encoder[\s\S]*load the pipeline with"):
        backbone.condition([PROMPT])
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(prfl.PrflError, match="two transformers"):
        prfl.backbone_from_pipeline(pipe)
    pipe.transformer_2 = pipe.transformer = None
    with pytest.raises(prfl.PrflError, match=r"no transformer[\s\S]*load the pipeline with"):
        prfl.backbone_from_pipeline(pipe)


def test_a_pipeline_in_place_of_a_backbone_or_a_folder(pipe: WanPipeline) -> None:
    """Called as a user's program does it, without the checks of types that tests have."""
    with pytest.raises(prfl.PrflError, match=r"a WanPipeline is no backbone[\s\S]*backbone_from_pipeline"):
        unwrap(prfl.LatentReward.from_pretrained)(reward_folder(), pipe)
    with pytest.raises(prfl.PrflError, match="backbone_from_pipeline"):
        unwrap(prfl.load_backbone)(pipe)


def test_a_pixel_reward_says_how_it_is_loaded(tmp_path) -> None:
    from prfl.reward import PixelNetwork

    backbone = prfl.load_backbone("shapes")
    prfl.PixelReward(PixelNetwork(backbone.facts.text_width, ["look"])).save_pretrained(tmp_path)
    with pytest.raises(prfl.PrflError, match=r"a pixel reward[\s\S]*PixelReward.from_pretrained"):
        prfl.load_reward(tmp_path, backbone)
