"""ModelScope's UNet: its call, its blocks' tokens, and a VAE that takes every frame by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from prfl.backbone.blocks import first_tensor
from prfl.backbone.on_path import PathBackbone
from prfl.backbone.unet import pictures, tokens_of_pictures, videos


class ModelScopeBackbone(PathBackbone):
    """A text-to-video model of diffusers' UNet3DConditionModel.  Made by ``load_backbone``; its weights are frozen."""

    def predict(self, text: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """The network's noise, or v, at latents of the path."""
        (predicted,) = self.network(x.to(self.facts.dtype), timestep, encoder_hidden_states=text, return_dict=False)
        return predicted.to(x.dtype)

    def video_tokens(self, batch: int, output: Any) -> Tensor:
        return tokens_of_pictures(batch, first_tensor(output))

    # ------------------------------------------------------------------------------------------------- the VAE

    def encode(self, pixels: Float[Tensor, "b 3 f H W"]) -> Float[Tensor, "b c t h w"]:
        """Pixels in [-1, 1] to normalised latents (the posterior's mean), in the VAE's dtype."""
        self.latent_shape(*pixels.shape[2:])
        vae = self.vae.to(self.facts.device)
        latents = vae.encode(pictures(pixels).to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
        return videos(latents, len(pixels))

    def decode(
        self, latents: Float[Tensor, "b c t h w"], shown: Sequence[int] | None = None
    ) -> Float[Tensor, "b 3 f H W"]:
        """Normalised latents to *unclamped* pixels, in the VAE's dtype: the frames that are shown, and no other.

        Under checkpointing the decoder is checkpointed too, as diffusers has it.
        """
        vae = self.vae.to(self.facts.device)
        checkpointed = self.running.checkpointing != "none"
        vae.enable_gradient_checkpointing() if checkpointed else vae.disable_gradient_checkpointing()
        wanted = latents if shown is None else latents[:, :, list(shown)]
        pixels = vae.decode(pictures(wanted).to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return videos(pixels, len(latents))
