"""A small reward on decoded pixels: VADER-like methods differentiate it, and it is the latent reward's baseline.

It is trained on clean videos only, so it is not noise-aware: at sigma > 0 it may be used on a decoded clean prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone.condition import EMBEDS, LENGTHS, Condition
from prfl.backbone.weights import without_weights
from prfl.reward.checkpoint import RewardCard, SavedReward, shapes_of, write_reward
from prfl.reward.checkpoint_schema import StoredPixel
from prfl.reward.head import distinct
from prfl.reward.scores import Normalisation, Scores
from prfl.utils.errors import PrflError

KIND = StoredPixel.kind
TIME_FREQUENCIES = 4


class PixelNetwork(nn.Module):
    """Maps pixels (b, 3, f, H, W) and prompt embeddings to logits (b, dimensions); about 0.2 M parameters.

    Frames are resized to ``size`` x ``size``; each goes through strided 2-D convolutions that also see the pixels'
    coordinates, then the difference to the frame before, a mark of its time in the clip, and two 1-D convolutions
    over frames join them.  Any number of frames from 1 on works, evenly spaced or not (``times``).
    text_width: channels of the prompt embeddings.
    """

    def __init__(
        self, text_width: int, dimensions: Sequence[str], *, size: int = 32, hidden: int = 32, inner: int = 96
    ) -> None:
        super().__init__()
        self.dimensions = distinct(dimensions)
        self.settings: dict[str, object] = dict(
            text_width=text_width, dimensions=list(dimensions), size=size, hidden=hidden, inner=inner
        )
        self.text_width = text_width
        self.size = size

        # Each frame: colours and coordinates in, a map of features out, and where in it to look.
        layers: list[nn.Module] = []
        widths = [5, hidden, 2 * hidden, inner]
        for source, target in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(source, target, 3, stride=2, padding=1), nn.GroupNorm(4, target), nn.SiLU()]
        self.frame = nn.Sequential(*layers)
        self.look = nn.Conv2d(inner, 1, 1)

        # Over the frames, and together with the prompt.
        self.join = nn.Linear(4 * inner + 2 * TIME_FREQUENCIES, inner)
        self.mix = nn.ModuleList([nn.Conv1d(inner, inner, 3, padding=1) for _ in range(2)])
        self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, 2 * inner))
        self.mlp = nn.Sequential(
            nn.LayerNorm(6 * inner), nn.Linear(6 * inner, inner), nn.GELU(), nn.Linear(inner, len(dimensions))
        )

    def forward(
        self, pixels: Float[Tensor, "b 3 f h w"], text: Float[Tensor, "b d"], times: Float[Tensor, " f"]
    ) -> Float[Tensor, "b k"]:
        """Compute logits.  text: mean prompt embeddings.  times: of the frames in the clip, from 0 to 1."""
        frames = self._frames(pixels)

        # What changed since the frame before.  The first has none before it; its difference is zero.
        step = torch.diff(frames, dim=1, prepend=frames[:, :1])

        # When in the clip each frame is.
        angles = times[:, None] * torch.pi * 2.0 ** torch.arange(TIME_FREQUENCIES, device=times.device)
        marks = torch.cat([angles.sin(), angles.cos()], dim=1).to(frames).expand(len(frames), -1, -1)

        joined = self.join(torch.cat([frames, step, marks], dim=2)).transpose(1, 2)  # (b, inner, f)
        for convolution in self.mix:
            joined = joined + convolution(F.silu(joined))

        video = torch.cat([joined.mean(2), joined.amax(2)], dim=1)  # (b, 2 * inner)
        words = self.text(text.to(frames))
        return self.mlp(torch.cat([video, words, video * words], dim=1))

    def _frames(self, pixels: Float[Tensor, "b 3 f h w"]) -> Float[Tensor, "b f c"]:
        """Encode each frame on its own: the features where the network looks, and the mean of all of them."""
        batch, count = pixels.shape[0], pixels.shape[2]
        flat = pixels.to(self.look.weight.dtype).transpose(1, 2).flatten(0, 1)  # (b * f, 3, h, w)
        if flat.shape[2:] != (self.size, self.size):
            flat = F.interpolate(flat, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)

        line = torch.linspace(-1, 1, self.size).to(flat)
        coordinates = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(flat), -1, -1, -1)
        maps = self.frame(torch.cat([flat, coordinates], dim=1))  # (b * f, c / 2, h / 8, w / 8)

        attention = self.look(maps).flatten(2).softmax(2)
        attended = (maps.flatten(2) * attention).sum(2)
        return torch.cat([attended, maps.mean((2, 3))], dim=1).unflatten(0, (batch, count))


def pooled_prompt(condition: Condition) -> Float[Tensor, "b d"]:
    """Average the prompt embeddings over the tokens that are no padding."""
    embeds = condition.tensors[EMBEDS].float()
    lengths = condition.tensors[LENGTHS].to(embeds.device)[:, None]
    is_text = torch.arange(embeds.shape[1], device=embeds.device) < lengths
    return (embeds * is_text[..., None]).sum(1) / lengths.to(embeds).clamp(min=1)


class PixelReward:
    """``reward(pixels, condition)`` gives {dimension: (b,)}, differentiable in the pixels.

    Pixels are unclamped, about [-1, 1].  With a subset of a clip's frames that is not evenly spaced from the first
    to the last, give their ``times`` in [0, 1].
    """

    space = "pixel"
    noise_aware = False
    differentiable = True
    frames_at_once = None

    def __init__(
        self, network: PixelNetwork, normalisation: Normalisation | None = None, card: RewardCard | None = None
    ) -> None:
        self.network = network
        self.normalisation = normalisation or Normalisation.none(network.dimensions)
        self.card = card or RewardCard()

    @property
    def dimensions(self) -> tuple[str, ...]:
        return self.network.dimensions

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        return self.normalisation.apply(self.logits(pixels, condition, times))

    def logits(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Compute raw logits.  Raises PrflError for prompt embeddings of another text encoder's width."""
        width = condition.tensors[EMBEDS].shape[2]
        if width != self.network.text_width:
            raise PrflError(
                f"the pixel reward reads prompt embeddings of width {self.network.text_width}, got {width}",
                fix="use the text encoder that it was trained with, or train a pixel reward for this one",
            )

        if times is None:
            times = torch.linspace(0, 1, pixels.shape[2], device=pixels.device)
        logits = self.network(pixels, pooled_prompt(condition), times.to(pixels.device, torch.float32))
        return dict(zip(self.dimensions, logits.unbind(1), strict=True))

    def calibrate(self, logits: Scores) -> None:
        """Set the stored mean and deviation from validation logits."""
        self.normalisation = Normalisation.of(logits)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    def freeze(self) -> PixelReward:
        """Keep no gradient for the network, as scoring a policy needs; pixels still receive theirs."""
        self.network.requires_grad_(False)
        return self

    def state(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(dict(tensors))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``reward.safetensors``."""
        config = {
            "network": self.network.settings,
            "normalisation": asdict(self.normalisation),
            "card": asdict(self.card),
        }
        write_reward(folder, KIND, config, self.state())

    @staticmethod
    def from_pretrained(
        folder_or_hub: str | Path, revision: str | None = None, device: torch.device | str = "cpu"
    ) -> PixelReward:
        """Load a saved reward, frozen."""
        saved = SavedReward.find(folder_or_hub, StoredPixel, revision)
        settings = saved.config.network.model_dump()
        with without_weights():
            shapes = shapes_of(PixelNetwork(**settings))
        tensors = saved.weights(shapes)

        reward = PixelReward(PixelNetwork(**settings).to(device), saved.config.normalisation, saved.config.card)
        reward.load_state(tensors)
        return reward.freeze()
