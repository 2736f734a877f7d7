"""Wan 2.1 at 1.3B with random weights: the real classes, sizes and dtypes, on a clip of a few tokens.

The text encoder alone is small, with embeddings of the real width.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from prfl.backbone import LoraSpec
from prfl.backbone.families import architecture_folder, load_architecture
from prfl.backbone.source import Source
from prfl.backbone.wan.loading import assemble, flow_schedule
from prfl.backbone.wan.model import WanBackbone
from prfl.objective.loss import RewardLoss
from prfl.objective.methods.prfl import Prfl
from prfl.objective.reward_gradient import RewardGradient
from prfl.reward import LatentReward, RewardHead
from prfl.reward.scorer import LatentScorer
from prfl.rollout.solvers import euler
from tests.tiny import WORDS, tiny_tokenizer

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SHAPE = (16, 2, 4, 4)  # 5 frames of 32 x 32: 8 tokens


def random_weights(kind: type, config: dict, like: nn.Module) -> nn.Module:
    """A model whose parameters have the dtypes of ``like`` and small random values; its buffers are the real ones.

    All of a dtype are views of the same values, since drawing them all takes 13 s, and copying them 8 s; they are
    frozen, and nothing writes into them.
    """
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(config)  # type: ignore[attr-defined]
    most = max(meta.numel() for meta in like.parameters())
    drawn = 0.02 * torch.randn(most, generator=torch.Generator().manual_seed(0))
    numbers = {dtype: drawn.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    owners = dict(model.named_modules())
    for name, meta in like.named_parameters():
        path, _, last = name.rpartition(".")
        value = numbers[meta.dtype][: meta.numel()].view(meta.shape)
        setattr(owners[path], last, nn.Parameter(value, requires_grad=False))
    return model


@pytest.fixture(scope="module")
def wan_1_3b() -> WanBackbone:
    source = Source(architecture_folder(MODEL), None, torch.device("cpu"))
    meta = load_architecture(MODEL, torch.bfloat16)
    transformer = random_weights(
        WanTransformer3DModel, source.config(WanTransformer3DModel, "transformer"), meta.transformer
    )
    vae = random_weights(AutoencoderKLWan, source.config(AutoencoderKLWan, "vae"), meta.vae)
    small = UMT5Config(
        vocab_size=len(WORDS) + 3, d_model=4096, d_kv=8, d_ff=8, num_layers=1, num_heads=1, pad_token_id=0
    )
    text = tiny_tokenizer(), UMT5EncoderModel(small).eval()
    return assemble(source, flow_schedule(source), transformer, vae, lambda: text)


@pytest.mark.slow
def test_a_prfl_step_at_the_real_size(wan_1_3b: WanBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = wan_1_3b
    assert sum(p.numel() for p in backbone.transformer.parameters()) == 1_418_996_800
    assert backbone.latent_shape(5, 32, 32) == SHAPE
    backbone.add_adapter("policy", LoraSpec(rank=4, alpha=4, targets=["to_q", "to_v"]))
    reward = LatentReward(RewardHead(backbone.facts.widths[0], ["motion"], inner=32, hidden=32), backbone, [7]).freeze()
    monkeypatch.setattr(type(backbone), "decode", lambda *_: pytest.fail("a latent method decoded"))
    objective = RewardGradient(
        backbone, Prfl(euler(torch.tensor([1.0, 0.6, 0.0])), seed=0), LatentScorer(reward), RewardLoss({"motion": 1.0}),
        ["a red circle moves left"], SHAPE,
    )  # fmt: skip
    metrics = objective.accumulate(0, [0])
    assert torch.isfinite(torch.tensor(metrics["loss"]))
    gradients = {name: p.grad for name, p in objective.parameters().items()}
    # lora_A has none yet: its lora_B is zero.
    reached = {name: g.abs().max() > 0 for name, g in gradients.items() if "lora_B" in name and g is not None}
    assert len(reached) == 2 * 2 * backbone.facts.num_blocks and all(reached.values()), reached
