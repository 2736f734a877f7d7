"""What a latent reward is given to score, made ready: numbers for sigmas, texts for conditions, one for all samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone import Backbone, Condition, Facts
from prfl.utils.errors import PrflError

Sigmas: TypeAlias = Tensor | float | int | Sequence[float | int]
Prompts: TypeAlias = Condition | str | Sequence[str]


def prepare(
    backbone: Backbone, latents: Float[Tensor, "*n c t h w"], sigma: Sigmas, condition: Prompts
) -> tuple[Float[Tensor, "b c t h w"], Float[Tensor, " b"], Condition]:
    """Put latents, sigmas (float32) and conditions on the backbone's device, one for each of b samples.

    What there is one of is for all samples; latents may lack the batch's axis.
    Raises PrflError for a sigma outside of 0 to 1, latents of another model, and numbers of samples that differ.
    """
    check_latents(latents, backbone.facts)
    latents = latents.to(backbone.facts.device)
    latents = latents if latents.ndim == 5 else latents[None]
    levels = _levels(sigma).to(backbone.facts.device)
    if isinstance(condition, str):
        condition = [condition]
    if not isinstance(condition, Condition):
        condition = backbone.condition(list(condition))

    counts = {"latents": len(latents), "sigmas": len(levels), "prompts": len(condition)}
    batch = max(counts.values())
    if set(counts.values()) - {1, batch}:
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        fix = "give one for each sample, or one for all of them"
        raise PrflError(f"these do not belong to the same samples: {listed}", where="reward", fix=fix)
    if len(condition) < batch:
        condition = condition[[0] * batch]
    return latents.expand(batch, -1, -1, -1, -1), levels.expand(batch), condition


def check_latents(latents: Tensor, facts: Facts, where: str = "latents") -> None:
    """Raise PrflError unless these are of a shape that the model's VAE gives."""
    shape = tuple(latents.shape)
    fix = "give latents of this model's VAE, normalised: (channels, frames, height, width), or with a batch in front"
    if latents.ndim not in (4, 5) or not latents.is_floating_point():
        raise PrflError(f"{shape} of {latents.dtype} are no latents", where=where, fix=fix)
    channels, *sizes = shape[-4:]
    if channels != facts.latent_channels:
        what = f"{shape} has {channels} channels, and the latents of {facts.model_id} have {facts.latent_channels}"
        raise PrflError(what, where=where, fix=fix)
    for name, size, patch in zip(("frames", "height", "width"), sizes, facts.patch, strict=True):
        if size < patch or size % patch:
            what = f"{name} of {size} in {shape} do not split into the model's patches of {patch}"
            raise PrflError(what, where=where, fix=f"cut the latents to a multiple of {patch}")


def check_backbone(backbone: object) -> None:
    """Raise PrflError for what is no backbone: a pipeline has the same networks, and is taken for one."""
    if not isinstance(backbone, Backbone):
        fix = "give prfl.load_backbone(folder or hub id); of a pipeline prfl.backbone_from_pipeline(pipe)"
        raise PrflError(f"a {type(backbone).__name__} is no backbone", where="backbone", fix=fix)


def _levels(sigma: Sigmas) -> Float[Tensor, " n"]:
    """Noise levels as float32, in one dimension.  Raises PrflError outside of 0 to 1."""
    levels = torch.as_tensor(sigma, dtype=torch.float32)
    if levels.ndim > 1:
        fix = "give one number, or one for each sample"
        raise PrflError(f"noise levels of shape {tuple(levels.shape)}", where="sigma", fix=fix)
    levels = levels.reshape(-1)
    if not levels.is_meta and not bool(((levels >= 0) & (levels <= 1)).all()):
        wrong = next(level for level in levels.tolist() if not 0 <= level <= 1)
        fix = "sigma is a share of noise: 0 is clean, 1 is noise; of a timestep of diffusers, divide it by 1000"
        raise PrflError(f"{wrong:g} is no noise level", where="sigma", fix=fix)
    return levels
