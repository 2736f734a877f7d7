"""CogVideoX as a flow: the velocity from its v-prediction, the chain from its table of timesteps, and the VAE."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from jaxtyping import Float
from torch import Tensor

from prfl.backbone.base import Facts
from prfl.backbone.cogvideox import vae as vae_codec
from prfl.backbone.cogvideox.text import CogVideoXText
from prfl.backbone.condition import EMBEDS, Condition
from prfl.backbone.flow_form import VariancePreserving
from prfl.backbone.hooked import HookedBackbone
from prfl.utils.errors import PrflError
from prfl.utils.schedule import chain_sigmas


class CogVideoXBackbone(HookedBackbone):
    """A CogVideoX text-to-video model.  Made by ``load_backbone``; every base weight is frozen."""

    latent_group = 2  # what its VAE decodes together

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        vae: AutoencoderKLCogVideoX,
        text: CogVideoXText,
        facts: Facts,
        scheduler: CogVideoXDDIMScheduler,
    ) -> None:
        super().__init__({"transformer": transformer}, vae, text, facts)
        self.scheduler, self.path = scheduler, VariancePreserving(scheduler.alphas_cumprod)

    # ------------------------------------------------------------------------------------------------- the network

    def velocity(
        self, latents: Float[Tensor, "b c t h w"], sigma: Float[Tensor, "*sigma"], condition: Condition
    ) -> Float[Tensor, "b c t h w"]:
        """noise - x0, from the network's v at the timestep whose place on the path is sigma.  Dtype of ``latents``."""
        flow = latents.to(torch.promote_types(latents.dtype, torch.float32))
        with self.precision(self.network.patch_embed.proj.weight):
            predict = partial(self._predict, condition.tensors[EMBEDS])
            return self.path.velocity(predict, flow, sigma.to(flow.device), "v_prediction").to(latents.dtype)

    def _predict(self, text: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """The network's v at latents of the path, (b, c, t, h, w).  timestep: (b,), not rounded."""
        assert len(text) == len(x), f"{len(x)} latents but {len(text)} conditions"
        (predicted,) = self.network(
            hidden_states=x.transpose(1, 2).to(self.facts.dtype),
            encoder_hidden_states=text.to(x.device, self.facts.dtype),
            timestep=timestep,
            image_rotary_emb=self._rotary(x),
            return_dict=False,
        )
        return predicted.transpose(1, 2).to(x.dtype)

    def _rotary(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the video's tokens, as the pipeline computes them; None where positions are added."""
        config, (frames, height, width) = self.network.config, x.shape[2:]
        if not config.use_rotary_positional_embeddings:
            return None
        patch = config.patch_size
        grid = height // patch, width // patch
        crop = get_resize_crop_region_for_grid(grid, config.sample_width // patch, config.sample_height // patch)
        return get_3d_rotary_pos_embed(config.attention_head_dim, crop, grid, frames, device=x.device)

    # ------------------------------------------------------------------------------------------------- the chain

    def sigmas(self, steps: int, shape: Sequence[int], shift: float | None = None) -> Float[Tensor, " n"]:
        """Those of the pipeline's timesteps, on which DDIM is Euler, or with a shift a flow's."""
        if shift is not None:
            return chain_sigmas(steps, shift)
        table = self.path.sigmas
        if steps > len(table):
            what = f"{steps} steps, and the model has {len(table)} timesteps"
            raise PrflError(what, where="rollout.steps", fix="take fewer, or give rollout.shift")
        self.scheduler.set_timesteps(steps)
        return torch.cat([table[self.scheduler.timesteps], table.new_zeros(1)])

    # ------------------------------------------------------------------------------------------------- the VAE

    def encode(self, pixels: Float[Tensor, "b 3 f H W"]) -> Float[Tensor, "b c t h w"]:
        """Pixels in [-1, 1] to normalised latents (the posterior's mean), in the VAE's dtype."""
        self.latent_shape(*pixels.shape[2:])
        return vae_codec.encode(self.vae.to(self.facts.device), pixels)

    def decode(
        self, latents: Float[Tensor, "b c t h w"], shown: Sequence[int] | None = None
    ) -> Float[Tensor, "b 3 f H W"]:
        """Normalised latents to *unclamped* pixels, in the VAE's dtype; under checkpointing the decoder is checkpointed
        too.

        shown: groups of latent frames behind the last of them are not decoded.  Raises PrflError for an even number of
        latent frames, of which the decoder makes more pixel frames than a video has.
        """
        if latents.shape[2] % self.latent_group != 1:
            what = f"{latents.shape[2]} latent frames: the VAE decodes 1 and then pairs"
            raise PrflError(what, fix="take a video of 8 n + 1 frames")
        vae, checkpointed = self.vae.to(self.facts.device), self.running.checkpointing != "none"
        return vae_codec.decode(vae, latents, shown, checkpointed)
