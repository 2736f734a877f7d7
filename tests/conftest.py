"""Shared fixtures: a random tiny Wan pipeline in the real diffusers folder format, and a backbone on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from prfl.backbone import Backbone, load_backbone
from tests import pictures

WORDS = (
    "a", "red", "green", "blue", "yellow", "circle", "square", "triangle", "moves",
    "left", "right", "up", "down", "quickly", "slowly",
)  # fmt: skip
CHANNELS, TEXT_WIDTH = 4, 16


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_text_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(WORDS) + 3, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        )
    ).eval()  # fmt: skip


def tiny_vae() -> AutoencoderKLWan:
    """4x in space and time; latent statistics are not 0 and 1, so that a forgotten normalisation shows."""
    return AutoencoderKLWan(
        base_dim=8, z_dim=CHANNELS, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 0.8, 1.0],
        scale_factor_spatial=4, scale_factor_temporal=4,
    ).eval()  # fmt: skip


def tiny_transformer(**changes) -> WanTransformer3DModel:
    """3 blocks of width 24 (2 heads of 12)."""
    settings = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": CHANNELS,
        "out_channels": CHANNELS, "text_dim": TEXT_WIDTH, "freq_dim": 16, "ffn_dim": 48, "num_layers": 3,
        "rope_max_seq_len": 32,
    }  # fmt: skip
    return WanTransformer3DModel(**{**settings, **changes}).eval()


def save_tiny_pipeline(folder: Path, seed: int = 0, **transformer_changes) -> Path:
    """Write a random pipeline of the real classes; another seed gives other weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        WanPipeline(
            tokenizer=tiny_tokenizer(),
            text_encoder=tiny_text_encoder(),
            vae=tiny_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=tiny_transformer(**transformer_changes),
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_hashes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hashes that are remembered stay out of the user's cache folder."""
    os.environ["PRFL_HASHES"] = str(tmp_path_factory.mktemp("hashes") / "hashes.sqlite")


@pytest.fixture
def blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots of one pixel, for tests that train by the command line; one that is marked ``pictures`` draws them."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(pictures.PNG, pictures.blank)


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: a random WanPipeline; 17 x 16 x 16 pixels are latents of (4, 5, 4, 4), 20 tokens."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny-wan")


@pytest.fixture(scope="session")
def make_tiny_pipeline() -> Callable[..., Path]:
    """``save_tiny_pipeline(folder, seed=0, **transformer_changes)``, for tests that need another model."""
    return save_tiny_pipeline


@pytest.fixture
def tiny_run(tmp_path: Path, tiny_pipeline_folder: Path) -> Callable[..., Path]:
    """``tiny_run(targets=..., rank=4, alpha=2)``: the folder of a finished PRFL run whose adapter does something."""

    def make(**adapter) -> Path:
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


@pytest.fixture
def tiny_backbone(tiny_pipeline_folder: Path) -> Backbone:
    """A fresh one per test, so that adapters added by one test are not seen by the next."""
    return load_backbone(tiny_pipeline_folder)
