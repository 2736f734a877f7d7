"""Encoding and decoding, for the families that have Wan's VAE."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from prfl.backbone.frames import detach_others, pixel_frames
from prfl.backbone.pipeline import PipelineBackbone
from prfl.backbone.wan import vae as vae_codec


class WanCodec(PipelineBackbone):
    def encode(self, pixels: Float[Tensor, "b 3 f H W"]) -> Float[Tensor, "b c t h w"]:
        """Pixels in [-1, 1] to normalised latents (the posterior's mean), in the VAE's dtype."""
        self.latent_shape(*pixels.shape[2:])
        return vae_codec.encode(self.vae.to(self.facts.device), pixels)

    def decode(
        self, latents: Float[Tensor, "b c t h w"], shown: Sequence[int] | None = None
    ) -> Float[Tensor, "b 3 f H W"]:
        """Normalised latents to *unclamped* pixels, in the VAE's dtype; under checkpointing the decoder is checkpointed
        too.

        shown: latent frames behind the last of them are not decoded; those before are, because the decoder is causal.
        """
        vae, checkpointed = self.vae.to(self.facts.device), self.running.checkpointing != "none"
        if shown is None:
            return vae_codec.decode(vae, latents, 0, checkpointed)
        passing = detach_others(latents, shown)[:, :, : shown[-1] + 1]
        pixels = vae_codec.decode(vae, passing, shown[0], checkpointed)
        return pixels[:, :, pixel_frames(shown, self.facts.temporal_factor)]
