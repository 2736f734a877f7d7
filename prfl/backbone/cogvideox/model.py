"""CogVideoX: the call of its network, and the VAE."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from jaxtyping import Float
from torch import Tensor

from prfl.backbone.cogvideox import vae as vae_codec
from prfl.backbone.on_path import PathBackbone
from prfl.utils.errors import PrflError


class CogVideoXBackbone(PathBackbone):
    """A CogVideoX text-to-video model.  Made by ``load_backbone``; every base weight is frozen."""

    latent_group = 2  # what its VAE decodes together

    def predict(self, text: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """The network's v at latents of the path."""
        (predicted,) = self.network(
            hidden_states=x.transpose(1, 2).to(self.facts.dtype),
            encoder_hidden_states=text,
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
