"""MPS: people's preference among pictures of one prompt, by a CLIP whose picture attends to parts of the prompt.

    c = CLIP's features of the condition's words;  t, p = of the prompt's tokens, of the picture's patches
    s[i] = max over j of c[j] . t[i], over its largest;  the picture may attend to token i where s[i] > 0.3
    score = exp(scale) cos(first token of cross(p, t), the prompt's embedding)

About 0 to 20; the mean over a video's frames.  ``cross`` is four layers: attention to the prompt with a gated MLP
beside it, then attention among the patches with one; a head has its own queries, all share one key and value.
The published checkpoint is a pickled module, which runs code when it is read: only safetensors are taken.
Source: arXiv 2405.14705, and DiffSynth-Studio's port for the layers and the 0.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from prfl.backbone.condition import Condition
from prfl.reward.look import Look, each_frame, frames_of, seen
from prfl.reward.open_clip import HEAD, HEADS_OF_1280
from prfl.reward.public import FrozenReward
from prfl.reward.published import published_tensors
from prfl.reward.scores import Scores
from prfl.reward.text_match import VIT_H_14
from prfl.reward.tokens import CLIP_TOKENS, Tokenise, read_tokeniser
from prfl.utils.errors import PrflError

FIX = "give MPS's tensors as safetensors, as ModelScope's DiffSynth-Studio/QualityMetric_reward_pretrained has them"
EXAMPLE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the CLIP that MPS is trained from
THRESHOLD = 0.3
LOOKS = "light, color, clarity, tone, style, ambiance, artistry"
DETAILS = "shape, face, hair, hands, limbs, structure, instance, texture"
MEANING = "quantity, attributes, position, number, location"
Aspect = Literal["overall", "aesthetics", "quality", "semantic"]
ASPECTS: dict[str, str] = {  # the condition's words
    "overall": f"{LOOKS}, {DETAILS}, {MEANING}, word, things",
    "aesthetics": LOOKS, "quality": DETAILS, "semantic": MEANING,
}  # fmt: skip


class BiaslessNorm(nn.Module):
    """A layer norm whose bias is a stored zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Buffer(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * values


def heads_of(x: Float[Tensor, "n p width"]) -> Float[Tensor, "n heads p channels"]:
    return x.unflatten(2, (-1, HEAD)).transpose(1, 2)


def attend(
    queries: Float[Tensor, "n heads p channels"],
    keys: Float[Tensor, "n k channels"],
    values: Float[Tensor, "n k channels"],
    mask: Tensor | None = None,
) -> Float[Tensor, "n p width"]:
    """Attend with several heads of queries to one head of keys and values."""
    keys, values = (part[:, None].expand(-1, queries.shape[1], -1, -1) for part in (keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Attends to the prompt's tokens, with a gated MLP beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = BiaslessNorm(width)
        self.to_q, self.to_out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 8 * width, bias=False), Gate(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(
        self, x: Float[Tensor, "n p w"], words: Float[Tensor, "n k w"], mask: Float[Tensor, "n 1 1 k"]
    ) -> Float[Tensor, "n p w"]:
        x = self.norm(x)
        keys, values = self.to_kv(words).chunk(2, dim=-1)
        return self.to_out(attend(heads_of(self.to_q(x)), keys, values, mask)) + self.ff(x)


class SelfAttention(nn.Module):
    """Attends among the patches, places turned into their queries and keys (RoPE), with a gated MLP beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = BiaslessNorm(width)
        self.sizes = [width, HEAD, HEAD, 8 * width]
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_out = nn.Sequential(Gate(), nn.Linear(4 * width, width, bias=False))

    def forward(self, x: Float[Tensor, "n p w"]) -> Float[Tensor, "n p w"]:
        queries, keys, values, inner = self.fused_attn_ff_proj(self.norm(x)).split(self.sizes, dim=-1)
        attended = attend(turned(heads_of(queries)), turned(keys), values)
        return self.attn_out(attended) + self.ff_out(inner)


def turned(x: Float[Tensor, "*n p channels"]) -> Float[Tensor, "*n p channels"]:
    """Turn pairs of channels by angles that grow with a token's place, 0, 1, ..."""
    channels = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float32)
    places = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    angles = places[:, None] * 10000.0 ** -(channels / x.shape[-1])
    cosine, sine = angles.cos().to(x.dtype).repeat(1, 2), angles.sin().to(x.dtype).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class MpsReward(FrozenReward):
    """``reward(pixels, condition)`` gives {"mps": (b,)}, differentiable in the pixels; it reads the prompts.

    aspect: which words are the condition.  tokenise: prompts to input_ids, (b, 77), filled up behind the end.
    """

    def __init__(self, clip: CLIPModel, cross: nn.ModuleList, tokenise: Tokenise, aspect: Aspect = "overall") -> None:
        super().__init__(("mps",), clip, cross)
        self.clip, self.cross, self.tokenise, self.aspect = clip, cross, tokenise, aspect
        self.look = Look(clip.config.vision_config.image_size, "crop")

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Score videos.  times: not read."""
        texts = self.read_prompts([ask.prompt for ask in condition.asks])
        of_frames = [part.repeat_interleave(pixels.shape[2], dim=0) for part in texts]
        scores = each_frame(self.score_frames, frames_of(pixels), *of_frames)
        return {"mps": scores.unflatten(0, (len(pixels), -1)).mean(1)}

    @torch.no_grad()
    def read_prompts(
        self, prompts: list[str]
    ) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "b d"], Float[Tensor, "b 1 1 k"]]:
        """Return the features of prompts' tokens, their embeddings of length 1, and 0 or -inf for each token."""
        words, ends = self.text_features(prompts)
        condition, _ = self.text_features([ASPECTS[self.aspect]])
        likeness = torch.einsum("bkd,jd->bkj", words, condition[0]).amax(2)
        relevant = likeness / likeness.amax(1, keepdim=True) > THRESHOLD
        mask = torch.zeros_like(likeness).masked_fill(~relevant, float("-inf"))
        return words, F.normalize(ends, dim=1), mask[:, None, None]

    def text_features(self, prompts: list[str]) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "b d"]]:
        """Project the features of all tokens, the filling ones too, and of the end's token."""
        projection = self.clip.text_projection
        output = self.clip.text_model(input_ids=self.tokenise(prompts)["input_ids"].to(projection.weight.device))
        return projection(output.last_hidden_state), projection(output.pooler_output)

    def score_frames(
        self,
        frames: Float[Tensor, "n 3 h w"],
        words: Float[Tensor, "n k d"],
        ends: Float[Tensor, "n d"],
        mask: Float[Tensor, "n 1 1 k"],
    ) -> Float[Tensor, " n"]:
        """Score single frames, pixels about [-1, 1], beside their prompts."""
        projection = self.clip.visual_projection
        inputs = seen(frames.to(projection.weight.dtype), self.look)
        x = projection(self.clip.vision_model(pixel_values=inputs).last_hidden_state)
        for to_words, among_patches in self.cross:
            x = x + to_words(x, words, mask)
            x = x + among_patches(x)
        return self.clip.logit_scale.exp() * (F.normalize(x[:, 0], dim=1) * ends).sum(1)


def load_mps(
    weights: str | Path,
    tokenizer: str,
    aspect: Aspect = "overall",
    revision: str | None = None,
    device: torch.device | str = "cpu",
) -> MpsReward:
    """Load MPS from safetensors, with the tokenizer of the CLIP that it is trained from.

    Raises PrflError for a pickle, another file, or one that is not all of it.
    """
    path = Path(weights)
    if path.suffix != ".safetensors":
        what = "MPS's own checkpoint is a pickled module, which runs code when it is read"
        raise PrflError(what, where=str(path), fix=FIX)
    tensors = {
        name.replace(".fn.", "."): value.float() for name, value in published_tensors(path, "an MPS", FIX).items()
    }
    try:
        clip, cross = build(config_of(tensors), len({name.split(".")[2] for name in tensors if name[:6] == "cross_"}))
        for network, prefix in ((clip, "model."), (cross, "cross_model.layers.")):
            network.load_state_dict(
                {
                    name.removeprefix(prefix): value
                    for name, value in tensors.items()
                    if name.startswith(prefix) and not name.endswith((".position_ids", ".inv_freq"))
                }
            )
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PrflError(f"is not all of an MPS: {reason}", where=str(path), fix=FIX) from error
    return MpsReward(clip, cross, read_tokeniser(tokenizer, revision, EXAMPLE), aspect).to(device)


def config_of(tensors: Mapping[str, Tensor]) -> CLIPConfig:
    """Read the sizes of the CLIP from its tensors.  Raises KeyError."""

    def side(name: str, width: int) -> dict[str, int]:
        prefix = f"model.{name}.encoder.layers."
        layers = {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
        inner = len(tensors[f"{prefix}0.mlp.fc1.weight"])
        heads = HEADS_OF_1280 if width == 1280 else max(1, width // HEAD)
        sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(layers)}
        return sizes | {"num_attention_heads": heads}

    words, text_width = tensors["model.text_model.embeddings.token_embedding.weight"].shape
    width, _, patch, _ = tensors["model.vision_model.embeddings.patch_embedding.weight"].shape
    patches = len(tensors["model.vision_model.embeddings.position_embedding.weight"]) - 1
    places = len(tensors["model.text_model.embeddings.position_embedding.weight"])
    return CLIPConfig(
        projection_dim=len(tensors["model.text_projection.weight"]),
        text_config={
            **side("text_model", text_width), "vocab_size": words, "max_position_embeddings": places,
            "hidden_act": "gelu", "bos_token_id": words - 2, "eos_token_id": words - 1,
        },
        vision_config={
            **side("vision_model", width), "patch_size": patch, "image_size": patch * round(patches**0.5),
            "hidden_act": "gelu",
        },
    )  # fmt: skip


def build(config: CLIPConfig, layers: int) -> tuple[CLIPModel, nn.ModuleList]:
    """Build the CLIP, and so many layers behind it, with random weights."""
    width = config.projection_dim
    pairs = [nn.ModuleList([CrossAttention(width), SelfAttention(width)]) for _ in range(layers)]
    return CLIPModel(config), nn.ModuleList(pairs)


def untrained() -> MpsReward:
    """Build one of the published size, whose bytes are counted on ``meta``; its words are all the same."""

    def tokenise(prompts: list[str]) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(len(prompts), CLIP_TOKENS, dtype=torch.long)}

    return MpsReward(*build(CLIPConfig(**VIT_H_14), layers=4), tokenise)
