"""Velocity, features, text folding and identity of the Wan backbone, against diffusers' own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanPipeline, WanTransformer3DModel

from prfl.backbone import Condition, load_backbone
from prfl.backbone.wan import model as wan_module
from prfl.backbone.wan.model import WanBackbone
from prfl.backbone.wan.text import fold_padding
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.guidance import guided_network
from prfl.rollout.solvers import euler
from prfl.rollout.trajectory import rollout
from prfl.utils.errors import PrflError
from tests.tolerance import assert_near

PROMPTS = ["a red circle moves left quickly", "a blue square", ""]


def make_latents(backbone: WanBackbone, batch: int = 3, seed: int = 0) -> torch.Tensor:
    shape = backbone.latent_shape(17, 16, 16)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def pipeline_text(backbone: WanBackbone, condition: Condition) -> torch.Tensor:
    embeds = condition.tensors["prompt_embeds"]
    return F.pad(embeds, (0, 0, 0, 512 - embeds.shape[1])).to(backbone.facts.dtype)


def plain_forward(backbone: WanBackbone, latents: torch.Tensor, sigma: torch.Tensor, condition: Condition):
    timestep = (sigma * 1000).float().expand(len(latents))
    return backbone.transformer(
        latents.to(backbone.facts.dtype), timestep, pipeline_text(backbone, condition), return_dict=False
    )[0]


# ------------------------------------------------------------------------------------------------------- velocity


def test_velocity_with_folded_text_is_the_transformer_on_512_tokens(tiny_backbone: WanBackbone) -> None:
    latents, sigma = make_latents(tiny_backbone), torch.tensor([0.2, 0.9, 1.0])
    condition = tiny_backbone.condition(PROMPTS)
    expected = plain_forward(tiny_backbone, latents, sigma, condition)
    torch.testing.assert_close(tiny_backbone.velocity(latents, sigma, condition), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1


def test_forgetting_the_padding_is_noticed(tiny_backbone: WanBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, sigma, condition = make_latents(tiny_backbone), torch.tensor(0.7), tiny_backbone.condition(PROMPTS)
    expected = plain_forward(tiny_backbone, latents, sigma, condition)

    def without_bias(embeds, lengths, total):
        folded, bias = fold_padding(embeds, lengths, total)
        return folded, torch.zeros_like(bias)

    monkeypatch.setattr(wan_module, "fold_padding", without_bias)
    assert (tiny_backbone.velocity(latents, sigma, condition) - expected).abs().max() > 1e-3


def test_velocity_at_the_ends_of_the_text_length(tiny_backbone: WanBackbone) -> None:
    prompts = ["red " * 600, "red " * 510, "red " * 509]  # 512 (truncated), 511, 510 tokens with the end token
    condition = tiny_backbone.condition(prompts)
    assert condition.tensors["lengths"].tolist() == [512, 511, 510]
    latents, sigma = make_latents(tiny_backbone), torch.tensor([0.1, 0.5, 0.9])
    for chosen in ([0, 1, 2], [0], [1], [2]):
        velocity = tiny_backbone.velocity(latents[chosen], sigma[chosen], condition[chosen])
        expected = plain_forward(tiny_backbone, latents[chosen], sigma[chosen], condition[chosen])
        torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-5)


def test_fold_padding_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, total, width = torch.tensor([1, 4, 7]), 64, 6
    embeds = torch.randn(3, 7, width, generator=generator, dtype=torch.float64)
    embeds[torch.arange(7) >= lengths[:, None]] = 0
    query = torch.randn(3, 5, width, generator=generator, dtype=torch.float64)
    weight, offset = torch.randn(width, width, dtype=torch.float64), torch.randn(width, dtype=torch.float64)

    def attend(text, bias):
        keys = text @ weight + offset  # keys and values of zero tokens are not zero
        return F.scaled_dot_product_attention(query, keys, keys.sin(), attn_mask=bias)

    expected = attend(F.pad(embeds, (0, 0, 0, total - 7)), None)
    folded, bias = fold_padding(embeds, lengths, total)
    assert folded.shape == (3, 8, width)
    torch.testing.assert_close(attend(folded, bias[:, None]), expected, rtol=0, atol=1e-13)
    long, long_bias = fold_padding(F.pad(embeds, (0, 0, 0, 20)), lengths, total)  # more padding changes nothing
    assert torch.equal(long, folded) and torch.equal(long_bias, bias)


def test_half_precision_keeps_all_tokens_and_equals_the_transformer(tiny_pipeline_folder: Path) -> None:
    backbone = load_backbone(tiny_pipeline_folder, dtype=torch.bfloat16)
    assert backbone.facts.dtype == torch.bfloat16 and backbone.vae.dtype == torch.float32
    latents, sigma, condition = make_latents(backbone), torch.tensor(0.7), backbone.condition(PROMPTS)
    velocity = backbone.velocity(latents, sigma, condition)
    assert velocity.dtype == torch.float32  # that of the latents: a chain is not rounded to bfloat16 at each step
    assert torch.equal(velocity, plain_forward(backbone, latents, sigma, condition).float())


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (1, 1, 2)])
def test_patches_are_put_back_in_their_place(
    make_tiny_pipeline: Callable[..., Path], tmp_path: Path, patch_size: tuple[int, int, int]
) -> None:
    backbone = load_backbone(make_tiny_pipeline(tmp_path / "m", patch_size=patch_size))
    latents = torch.randn(1, 4, 2, 4, 8)
    sigma, condition = torch.tensor([0.4]), backbone.condition(["a"])
    expected = plain_forward(backbone, latents, sigma, condition)
    torch.testing.assert_close(backbone.velocity(latents, sigma, condition), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- features


def captured_states(backbone: WanBackbone, run) -> list[torch.Tensor]:
    states: list[torch.Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _i, out: states.append(out)) for b in backbone.transformer.blocks]
    run()
    for hook in hooks:
        hook.remove()
    return states


def test_features_stop_after_the_last_wanted_block(tiny_backbone: WanBackbone) -> None:
    latents, sigma = make_latents(tiny_backbone), torch.tensor([0.2, 0.9, 1.0])
    condition = tiny_backbone.condition(PROMPTS)
    for count in (1, 2, 3):
        assert len(captured_states(tiny_backbone, lambda n=count: tiny_backbone.features(
            latents, sigma, condition, [n - 1]))) == count  # fmt: skip
    full = captured_states(tiny_backbone, lambda: plain_forward(tiny_backbone, latents, sigma, condition))
    second, first = tiny_backbone.features(latents, sigma, condition, [1, 0])
    assert first.shape == (3, 20, tiny_backbone.facts.widths[0])
    torch.testing.assert_close(first, full[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(second, full[1], rtol=0, atol=1e-5)


def test_features_share_the_weights(tiny_backbone: WanBackbone) -> None:
    latents, sigma, condition = make_latents(tiny_backbone), torch.tensor(0.5), tiny_backbone.condition(PROMPTS)
    before = tiny_backbone.features(latents, sigma, condition, [0])[0]
    tiny_backbone.transformer.blocks[0].ffn.net[2].weight.mul_(2)
    assert not torch.equal(tiny_backbone.features(latents, sigma, condition, [0])[0], before)


def test_latent_gradient_through_features_is_that_of_the_full_network(tiny_backbone: WanBackbone) -> None:
    latents, sigma = make_latents(tiny_backbone).requires_grad_(), torch.tensor([0.2, 0.9, 1.0])
    condition = tiny_backbone.condition(PROMPTS)
    score = tiny_backbone.features(latents, sigma, condition, [1])[0].sin().sum()
    (ours,) = torch.autograd.grad(score, latents)
    full = captured_states(tiny_backbone, lambda: plain_forward(tiny_backbone, latents, sigma, condition))
    (expected,) = torch.autograd.grad(full[1].sin().sum(), latents)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert ours.abs().max() > 0.1


def test_features_refuses_blocks_that_do_not_exist(tiny_backbone: WanBackbone) -> None:
    latents, condition = make_latents(tiny_backbone), tiny_backbone.condition(PROMPTS)
    for blocks in ([], [3], [-1]):
        with pytest.raises(PrflError, match="0 to 2"):
            tiny_backbone.features(latents, torch.tensor(0.5), condition, blocks)


# ------------------------------------------------------------------------------------------------------- the chain


def pipeline_latents(folder: Path, start: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    """WanPipeline on our sigmas (diffusers' own schedule ends differently)."""
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = pipeline.scheduler

    def set_timesteps(_steps: int, device: object = None) -> None:
        scheduler.sigmas = chain_sigmas(steps, scheduler.config.shift).float()
        scheduler.timesteps = scheduler.sigmas[:-1] * 1000
        scheduler.num_inference_steps = steps
        scheduler._step_index = scheduler._begin_index = None

    scheduler.set_timesteps = set_timesteps
    return pipeline(
        PROMPTS[:2], height=16, width=16, num_frames=17, num_inference_steps=steps, guidance_scale=guidance,
        latents=start, output_type="latent",
    ).frames  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_wan_pipeline_and_our_rollout_give_the_same_latents(tiny_pipeline_folder: Path, guidance: float) -> None:
    backbone = load_backbone(tiny_pipeline_folder)
    assert backbone.facts.shift == 3.0
    start, steps = make_latents(backbone, batch=2), 6
    sigmas = chain_sigmas(steps, backbone.facts.shift)
    condition, empty = backbone.condition(PROMPTS[:2]), backbone.condition(["", ""])
    network = guided_network(backbone.velocity, condition, empty, scale=guidance, gradient="both")
    latents = rollout(network, start, euler(sigmas), keep=set()).at(steps)
    expected = pipeline_latents(tiny_pipeline_folder, start, steps, guidance)
    assert_near(latents, expected, terms=48, depth=steps, condition=guidance)  # 48: the wide layer of a block
    assert (latents - start).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------------- conditions


def test_condition_is_what_the_pipeline_makes(tiny_backbone: WanBackbone, tiny_pipeline_folder: Path) -> None:
    prompts = ["  a   red\ncircle &amp; square ", "", "a unicorn"]
    condition = tiny_backbone.condition(prompts)
    pipeline = WanPipeline.from_pretrained(tiny_pipeline_folder)
    expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    torch.testing.assert_close(pipeline_text(tiny_backbone, condition), expected, rtol=0, atol=1e-5)
    assert condition.tensors["lengths"].tolist() == [6, 1, 3]  # & is an unknown word


def test_condition_select_join_and_cache(tiny_backbone: WanBackbone) -> None:
    condition = tiny_backbone.condition(PROMPTS)
    short, long = tiny_backbone.condition(PROMPTS[1:]), tiny_backbone.condition(PROMPTS[:1])
    joined = Condition.cat([short, long])[[2, 0, 1]]
    torch.testing.assert_close(joined.tensors["prompt_embeds"], condition.tensors["prompt_embeds"], rtol=0, atol=1e-5)
    assert torch.equal(joined.tensors["lengths"], condition.tensors["lengths"]) and len(joined) == 3
    assert len(condition[torch.tensor([1, 1, 1, 0])]) == 4 and len(condition[:2]) == 2
    assert [ask.prompt for ask in joined.asks] == PROMPTS
    assert condition.to(dtype=torch.float64).tensors["prompt_embeds"].dtype == torch.float64


# ------------------------------------------------------------------------------------------------------- identity


def test_latent_shape(tiny_backbone: WanBackbone) -> None:
    assert tiny_backbone.latent_shape(17, 32, 16) == (4, 5, 8, 4)
    assert tiny_backbone.latent_shape(1, 8, 8) == (4, 1, 2, 2)
    for size, fix in (((16, 16, 16), "13 or 17"), ((0, 16, 16), "1 or 5"), ((17, 20, 16), "16 or 24"),
                      ((17, 16, 4), "8 or 16")):  # fmt: skip
        with pytest.raises(PrflError, match=fix):
            tiny_backbone.latent_shape(*size)


def test_describe_tells_models_apart(
    tiny_backbone: WanBackbone, tiny_pipeline_folder: Path, make_tiny_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    described = json.loads(json.dumps(tiny_backbone.facts.identity))
    assert described["model_id"] == "tiny-wan" and described["num_blocks"] == 3 and described["width"] == 24
    assert load_backbone(tiny_pipeline_folder, dtype=torch.bfloat16).facts.identity == described
    other = load_backbone(make_tiny_pipeline(tmp_path / "tiny-wan", seed=1)).facts.identity
    assert other["model_id"] == described["model_id"]
    assert other["transformer_fingerprint"] != described["transformer_fingerprint"]
    assert other["vae_fingerprint"] != described["vae_fingerprint"]


@pytest.mark.parametrize("layer", ["blocks.2.attn2.to_q", "blocks.1.ffn.net.2", "proj_out"])
def test_a_fine_tune_of_any_layer_is_another_model(tiny_pipeline_folder: Path, layer: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-wan"
    shutil.copytree(tiny_pipeline_folder, folder)
    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        transformer.get_submodule(layer).weight.mul_(1.01)
    transformer.save_pretrained(folder / "transformer")
    one, other = load_backbone(tiny_pipeline_folder).facts.identity, load_backbone(folder).facts.identity
    changed = {key for key in one if one[key] != other[key]}
    assert changed == {"transformer_fingerprint"}
