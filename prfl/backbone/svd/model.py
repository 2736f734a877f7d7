"""Stable Video Diffusion: a video from a picture alone, on a path without a last noise, by a UNet.

Its latents are x = x0 + n noise, for n between 0.002 and 700.  Divided by 1 + n they are those of the one convention
at sigma n / (1 + n) (base.py); what the network reads, x / sqrt(n^2 + 1), is the variance-preserving path of
flow_form.py at the same sigma, and what it predicts is v there.  Its timestep is log(n) / 4, and EulerDiscrete on x is
Euler on the flow.

It reads no text: prompts are names of its pictures.  For the prompt "", which guidance goes away from, it is given
zeros in the place of the picture's embedding and latents, as by its pipeline.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone.base import Facts
from prfl.backbone.blocks import first_tensor
from prfl.backbone.condition import EMBEDS, LENGTHS, Ask, Condition
from prfl.backbone.first_frame import FRAME, FirstFrameBackbone, FirstFrameTold, check_size
from prfl.backbone.flow_form import VariancePreserving, start_size
from prfl.backbone.frames import detach_others
from prfl.backbone.hooked import HookedBackbone
from prfl.backbone.pipeline_text import PipelineText
from prfl.backbone.unet import pictures, tokens_of_pictures, videos
from prfl.utils.console import silent_libraries
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize

ADDED = "added_times"
"""The rate less one, how much moves, and how noisy the picture is: what the network is told beside it."""
CLIP_SIZE = 224  # pixels that the pipeline gives CLIP
CHUNK = 8  # frames that the VAE takes at once, as in diffusers' example of the pipeline (decode_chunk_size)
TABLE = 1000  # noise levels by which the middle of the chain is known


def resized(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 size size"]:
    """Pictures as small as the pipeline gives them to CLIP, by its own function."""
    with silent_libraries():  # its module asks for a processor of transformers that wants torchvision
        from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as pipeline
    return pipeline._resize_with_antialiasing(pictures, (CLIP_SIZE, CLIP_SIZE))


@dataclass(frozen=True)
class LogNoise(VariancePreserving):
    """The path, whose timesteps are a quarter of the noise's logarithm."""

    def timestep(self, sigma: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """At a sigma beyond the noise that the model was trained with, that of the nearest."""
        within = sigma.double().clamp(float(self.sigmas[0]), float(self.sigmas[-1]))
        return (within / (1 - within)).log() / 4


class Pictures(PipelineText):
    """CLIP's image encoder, in the place of a text encoder: the model reads no text."""

    most = 1

    def tokens(self, prompts: Sequence[str], *, cut: bool = True) -> list[tuple[int, ...]]:
        """One of its own for each prompt: what it says is not read, and prompts stay apart."""
        return [(int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6]),) for prompt in prompts]

    def unknown(self) -> int | None:
        return None

    def encode(self, asks: Sequence[Ask], device: torch.device, dtype: torch.dtype) -> Condition:
        raise NotImplementedError("a picture is encoded, and no text")

    @torch.no_grad()
    def embedding(self, picture: Float[Tensor, "3 H W"]) -> Float[Tensor, "1 1 width"]:
        """CLIP's embedding of a picture, as the pipeline has it."""
        processor, encoder = self._loaded
        weight = next(encoder.parameters())
        small = (resized(picture[None].float()) + 1) / 2
        mean, std = (small.new_tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
        return encoder(((small - mean) / std).to(weight)).image_embeds[:, None]


class SvdBackbone(FirstFrameBackbone, HookedBackbone):
    """A Stable Video Diffusion model.  Made by ``load_backbone``; every base weight is frozen."""

    text: Pictures

    def __init__(
        self, networks: Mapping[str, nn.Module], vae: nn.Module, text: Pictures, facts: Facts, scheduler: Any
    ) -> None:
        super().__init__(networks, vae, text, facts)
        self.scheduler, self.path = scheduler, path_of(scheduler)
        self.told, self._identity = FirstFrameTold(), facts.text_identity  # the pipeline's own

    def tell(self, told: FirstFrameTold) -> None:
        """Make conditions with these from now on; caches and runs tell them from those that were made before."""
        identity = self._identity
        if told != FirstFrameTold():
            identity = f"{identity or self.facts.identity['model_id']}, told {json.dumps(asdict(told))}"
        self.facts, self.told, self._last = replace(self.facts, text_identity=identity), told, None

    # ------------------------------------------------------------------------------------------------- the condition

    def frame_tensors(self, picture: Tensor, clip: VideoSize) -> dict[str, Tensor]:
        vae = self.vae.to(self.facts.device)
        noise = torch.randn(1, *picture.shape, generator=torch.Generator().manual_seed(0)).to(picture)
        latents = vae.encode((picture[None] + self.told.noise_aug_strength * noise).to(vae.dtype)).latent_dist.mode()
        added = latents.new_tensor([[clip.fps - 1, self.told.motion_bucket_id, self.told.noise_aug_strength]])
        return {EMBEDS: self.text.embedding(picture), FRAME: latents, ADDED: added}

    def encode_asks(self, asks: Sequence[Ask]) -> Condition:
        """Of pictures; for the prompt "" of none, at the same rate."""
        frames = [self._of_frame(ask) for ask in asks]
        tensors = {name: torch.cat([frame[name] for frame in frames]) for name in frames[0]}
        with_picture = torch.tensor([bool(ask.prompt) for ask in asks], device=self.facts.device)
        for name in (EMBEDS, FRAME):
            tensors[name] = tensors[name] * with_picture.reshape(-1, *[1] * (tensors[name].ndim - 1))
        lengths = torch.ones(len(asks), dtype=torch.int64, device=self.facts.device)
        return Condition({**tensors, LENGTHS: lengths}, tuple(asks))

    # ------------------------------------------------------------------------------------------------- the chain

    def velocity(
        self, latents: Float[Tensor, "b c t h w"], sigma: Float[Tensor, "*sigma"], condition: Condition
    ) -> Float[Tensor, "b c t h w"]:
        """noise - x0.  Raises PrflError for a condition of a picture of another size."""
        flow = latents.to(torch.promote_types(latents.dtype, torch.float32))
        tensors = condition.to(flow.device, self.facts.dtype).tensors
        check_size(tensors[FRAME], latents, 2)
        beside = tensors[FRAME][:, :, None].expand(-1, -1, flow.shape[2], -1, -1)

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            both = torch.cat([x.to(beside), beside], dim=1).transpose(1, 2)
            embeds, added = tensors[EMBEDS], tensors[ADDED]
            predicted = self.network(both, timestep, embeds, added_time_ids=added, return_dict=False)[0]
            return predicted.transpose(1, 2).to(x.dtype)

        with self.precision(next(self.network.parameters())):
            return self.path.velocity(predict, flow, sigma.to(flow.device), "v_prediction").to(latents.dtype)

    def video_tokens(self, batch: int, output: Any) -> Tensor:
        return tokens_of_pictures(batch, first_tensor(output))

    def sigmas(self, steps: int, shape: Sequence[int], shift: float | None = None) -> Float[Tensor, " n"]:
        """Those of the pipeline's noise levels.  Raises PrflError for a shift: the path does not reach noise."""
        if shift is not None:
            what = (
                f"this model's noise ends at sigma {float(self.path.sigmas[-1]):.4f}, and a shifted chain begins at 1"
            )
            raise PrflError(what, where="rollout.shift", fix="leave it out: the model has noise levels of its own")
        self.scheduler.set_timesteps(steps)
        return on_flow(self.scheduler.sigmas)

    def start(
        self, noise: Float[Tensor, "b c t h w"], condition: Condition, sigma: float
    ) -> Float[Tensor, "b c t h w"]:
        return noise * start_size(self.facts, sigma)

    # ------------------------------------------------------------------------------------------------- the VAE

    def encode(self, pixels: Float[Tensor, "b 3 f H W"]) -> Float[Tensor, "b c t h w"]:
        """Pixels in [-1, 1] to normalised latents (the posterior's mean), in the VAE's dtype."""
        self.latent_shape(*pixels.shape[2:])
        vae = self.vae.to(self.facts.device)
        parts = [vae.encode(part).latent_dist.mode() for part in pictures(pixels).to(vae.dtype).split(CHUNK)]
        return videos(torch.cat(parts) * vae.config.scaling_factor, len(pixels))

    def decode(
        self, latents: Float[Tensor, "b c t h w"], shown: Sequence[int] | None = None
    ) -> Float[Tensor, "b 3 f H W"]:
        """Normalised latents to *unclamped* pixels, in the VAE's dtype, chunk by chunk where frames are shown.

        The frames of a chunk see each other.  Under checkpointing the decoder is checkpointed too, as diffusers has it.
        """
        vae, count = self.vae.to(self.facts.device), latents.shape[2]
        checkpointed = self.running.checkpointing != "none"
        vae.enable_gradient_checkpointing() if checkpointed else vae.disable_gradient_checkpointing()
        wanted = list(range(count)) if shown is None else list(shown)
        raw = (latents if shown is None else detach_others(latents, shown)).to(vae.dtype) / vae.config.scaling_factor

        parts, frames = [], list[int]()
        for first in sorted({frame // CHUNK * CHUNK for frame in wanted}):
            together = raw[:, :, first : first + CHUNK]
            decoded = vae.decode(pictures(together), num_frames=together.shape[2]).sample
            parts.append(videos(decoded, len(latents)))
            frames += range(first, first + together.shape[2])
        pixels = torch.cat(parts, dim=2)
        return pixels if shown is None else pixels[:, :, [frames.index(frame) for frame in wanted]]


def on_flow(noise: Tensor) -> Tensor:
    """The sigma of latents x0 + n noise, float64."""
    return noise.double() / (1 + noise.double())


def path_of(scheduler: EulerDiscreteScheduler) -> LogNoise:
    """From the least noise to the most, as the pipeline's longest chain places it."""
    scheduler.set_timesteps(TABLE)
    return LogNoise(1 / (scheduler.sigmas[:-1].double().flip(0).square() + 1))
