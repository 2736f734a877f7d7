"""How well pictures fit the prompt, by a CLIP: its own score, PickScore, and HPS v2.1; the mean over a video's frames.

    score = factor * cos(image embedding, text embedding)

CLIP: factor 100.  PickScore (arXiv 2305.01569): the exponential of the model's own logit scale, about 100.  HPS v2
(arXiv 2306.09341): 1, scores of about 0.2 to 0.35.  CLIP and PickScore cut the middle square out of a picture; HPS lays
the whole picture on black.  A CLIP reads 77 tokens: what a longer prompt has behind them is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from prfl.backbone.condition import Condition
from prfl.reward.aesthetic import VIT_L_14
from prfl.reward.look import Look, each_frame, frames_of, seen
from prfl.reward.open_clip import read_open_clip
from prfl.reward.public import FrozenReward, load_network
from prfl.reward.scores import Scores
from prfl.reward.tokens import CLIP_TOKENS, Tokenise, read_tokeniser

VIT_H_14 = {  # the sizes of CLIP ViT-H/14, which PickScore and HPS v2 are trained from
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224, "hidden_act": "gelu",
    },
}  # fmt: skip

VIT_L_14_TEXT = {  # the sizes of CLIP ViT-L/14, whose own score is the default of ``clip``
    **VIT_L_14,
    "text_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    },
}  # fmt: skip


class TextMatch(FrozenReward):
    """``reward(pixels, condition)`` gives {name: (b,)}, differentiable in the pixels; it reads the condition's prompts.

    name: of its score.  fit: of its look.  factor: None is the exponential of the model's own logit scale.
    tokenise: prompts to input_ids and attention_mask, each (b, tokens).
    """

    def __init__(
        self, name: str, clip: CLIPModel, tokenise: Tokenise, fit: Literal["crop", "pad"], factor: float | None
    ) -> None:
        super().__init__((name,), clip)
        self.clip, self.tokenise = clip, tokenise
        self.look = Look(clip.config.vision_config.image_size, fit)
        self.factor = factor

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Score videos.  times: not read."""
        texts = self.text_embeddings([ask.prompt for ask in condition.asks])
        scores = each_frame(self.score_frames, frames_of(pixels), texts.repeat_interleave(pixels.shape[2], dim=0))
        return {self.dimensions[0]: scores.unflatten(0, (len(pixels), -1)).mean(1)}

    @torch.no_grad()
    def text_embeddings(self, prompts: list[str]) -> Float[Tensor, "b d"]:
        """Embed prompts, each of length 1."""
        weight = self.clip.text_projection.weight
        tokens = {name: ids.to(weight.device) for name, ids in self.tokenise(prompts).items()}
        return F.normalize(self.clip.text_projection(self.clip.text_model(**tokens).pooler_output), dim=1)

    def score_frames(self, frames: Float[Tensor, "n 3 h w"], texts: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Score single frames, pixels about [-1, 1], beside their prompts' embeddings."""
        projection = self.clip.visual_projection
        inputs = seen(frames.to(projection.weight.dtype), self.look)
        images = F.normalize(projection(self.clip.vision_model(pixel_values=inputs).pooler_output), dim=1)
        factor = self.clip.logit_scale.exp() if self.factor is None else self.factor
        return factor * (images * texts).sum(1)


def load_clip(model: str, revision: str | None = None, device: torch.device | str = "cpu") -> TextMatch:
    """Load CLIP's own score from a folder or hub id.  Raises PrflError."""
    example = "openai/clip-vit-large-patch14"
    clip = load_network(CLIPModel, model, revision, example)
    return TextMatch("clip", clip, read_tokeniser(model, revision, example), "crop", 100.0).to(device)


def load_pickscore(model: str, revision: str | None = None, device: torch.device | str = "cpu") -> TextMatch:
    """Load PickScore from a folder or hub id.  Raises PrflError."""
    example = "yuvalkirstain/PickScore_v1"
    clip = load_network(CLIPModel, model, revision, example)
    return TextMatch("pickscore", clip, read_tokeniser(model, revision, example), "crop", None).to(device)


def load_hps(
    weights: str | Path, tokenizer: str, revision: str | None = None, device: torch.device | str = "cpu"
) -> TextMatch:
    """Load HPS v2 from its .pt file, in open_clip's names, or its tensors as safetensors.

    tokenizer: a folder or hub id with a CLIP's tokenizer; all of them have the same words.  Raises PrflError.
    """
    clip = read_open_clip(Path(weights))
    return TextMatch("hps", clip, read_tokeniser(tokenizer, revision, "openai/clip-vit-large-patch14"), "pad", 1.0).to(
        device
    )


def untrained(name: str, sizes: Mapping[str, Any] = VIT_H_14) -> TextMatch:
    """Build one of these sizes, whose bytes are counted on ``meta``; its words are all the same."""

    def tokenise(prompts: list[str]) -> dict[str, Tensor]:
        # No mask: one would be looked into.
        return {"input_ids": torch.zeros(len(prompts), CLIP_TOKENS, dtype=torch.long)}

    return TextMatch(name, CLIPModel(CLIPConfig(**sizes)), tokenise, "crop", 100.0)
