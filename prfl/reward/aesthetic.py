"""LAION's aesthetic score as a pixel reward: CLIP ViT-L/14, then a small MLP; the score that VADER's authors raise.

A frame's score is MLP(f / |f|), f its CLIP image embedding: about 1 to 10, most pictures 4 to 7.  A video's is the mean
over its frames.  It reads neither the prompt nor motion.
Source: LAION's improved-aesthetic-predictor, as VADER (arXiv 2407.08737) differentiates it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from prfl.backbone.condition import Condition
from prfl.reward.look import Look, each_frame, frames_of, seen
from prfl.reward.public import FrozenReward, load_network
from prfl.reward.published import published_tensors
from prfl.reward.scores import Scores
from prfl.utils.errors import PrflError

DIMENSION = "aesthetic"

VIT_L_14 = {  # what decides the size of openai/clip-vit-large-patch14's image side
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224,
    },
}  # fmt: skip


class AestheticMlp(nn.Module):
    """Maps embeddings (n, width) to scores (n,): five linear layers, nothing between them but dropout in training.

    The names of the parameters are those of the published weights: layers.0, 2, 4, 6 and 7.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, embeddings: Float[Tensor, "n w"]) -> Float[Tensor, " n"]:
        return self.layers(embeddings).squeeze(1)


class AestheticReward(FrozenReward):
    """``reward(pixels, condition)`` gives {"aesthetic": (b,)}, differentiable in the pixels; its networks are frozen.

    Pixels are unclamped, about [-1, 1].  Where gradients flow, CLIP's activations are computed again, a few frames at
    a time, in the backward pass.
    Raises PrflError when the MLP does not take the CLIP's embeddings.
    """

    def __init__(self, clip: CLIPModel, mlp: AestheticMlp) -> None:
        width = mlp.layers[0].in_features
        if clip.config.projection_dim != width:
            raise PrflError(
                f"the aesthetic MLP reads embeddings of width {width}, this CLIP's have {clip.config.projection_dim}",
                where="reward.aesthetic.clip",
                fix="take the CLIP that the MLP was trained on: openai/clip-vit-large-patch14",
            )
        super().__init__((DIMENSION,), clip.vision_model, clip.visual_projection, mlp)
        self.vision, self.projection, self.mlp = clip.vision_model, clip.visual_projection, mlp
        self.look = Look(clip.config.vision_config.image_size, mode="bilinear")

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Score videos.  condition, times: not read; they are there because every pixel reward is called so."""
        scores = each_frame(self.score_frames, frames_of(pixels))
        return {DIMENSION: scores.unflatten(0, (len(pixels), -1)).mean(1)}

    @classmethod
    def untrained(cls) -> AestheticReward:
        """Build one of the published size (ViT-L/14) with random weights, whose bytes are counted on ``meta``."""
        return cls(CLIPModel(CLIPConfig(**VIT_L_14)), AestheticMlp())

    def score_frames(self, frames: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """Score single frames, pixels about [-1, 1]."""
        frames = seen(frames.to(self.projection.weight.dtype), self.look)
        embeddings = self.projection(self.vision(pixel_values=frames).pooler_output)
        return self.mlp(F.normalize(embeddings, dim=1))


def load_aesthetic(
    clip: str | Path, mlp: str | Path, revision: str | None = None, device: torch.device | str = "cpu"
) -> AestheticReward:
    """Load the CLIP from a folder or hub id (safetensors only), the MLP from a .pth or .safetensors file; float32.

    Raises PrflError when one of them cannot be read, is something else, or the two do not fit.
    """
    network = load_network(CLIPModel, str(clip), revision, "openai/clip-vit-large-patch14")
    return AestheticReward(network, read_mlp(mlp)).to(device)


def read_mlp(path: str | Path) -> AestheticMlp:
    """Read the MLP in a file.  A .pth is a pickle: only its tensors are read, and no code in it is run."""
    path, where = Path(path), str(path)
    fix = "give the published sac+logos+ava1-l14-linearMSE.pth, or its tensors as safetensors"
    tensors = published_tensors(path, "an aesthetic MLP", fix)
    first = tensors.get("layers.0.weight")
    if first is None or first.ndim != 2:
        raise PrflError("holds no aesthetic MLP: it has no matrix 'layers.0.weight'", where=where, fix=fix)
    mlp = AestheticMlp(first.shape[1])
    try:
        mlp.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise PrflError(f"holds no aesthetic MLP: {reason}", where=where, fix=fix) from error
    return mlp
