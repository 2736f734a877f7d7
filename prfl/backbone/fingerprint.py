"""A short hash that tells models apart by their weights, and a few of the weights themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prfl.utils.hashing import json_hash

SAMPLED = 1024  # values of each parameter of a transformer that are read
NO_WEIGHTS = "no weights"  # the fingerprint of a model on the meta device
# Of diffusers' configs, what another value of changes the numbers that the same weights give.
SETTINGS = (
    "patch_size", "num_attention_heads", "attention_head_dim", "freq_dim", "cross_attn_norm", "qk_norm", "eps",
    "rope_max_seq_len", "latents_mean", "latents_std", "temperal_downsample", "dim_mult", "is_residual",
)  # fmt: skip


def settings_fingerprint(*configs: Mapping[str, Any], names: Sequence[str] = SETTINGS) -> str:
    """16 hexadecimal digits that tell apart models of the same weights: 2 heads of 12 have the shapes of 4 of 6."""
    facts = [{name: config.get(name) for name in names} for config in configs]
    return json_hash(facts)[:16]


def fingerprint(module: nn.Module, most: int | None = None) -> str:
    """16 hexadecimal digits of the sha256 of the parameters, each in bfloat16; ``NO_WEIGHTS`` on meta.

    LoRA adapters on it do not count, and the layers that carry them keep their names.
    most: of each parameter at most about so many values, evenly spaced: any training moves nearly all of them, and
    hashing the 14 billion of a large model would take a minute.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        return NO_WEIGHTS
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // most) if most else 1
        values = flat[::step].to("cpu", torch.bfloat16).contiguous()
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def sampled(tensors: Mapping[str, Tensor], most: int) -> dict[str, Tensor]:
    """Of each tensor at most about so many values, evenly spaced: as they are, in float64 in host memory."""
    flat = {name: tensor.detach().flatten() for name, tensor in tensors.items()}
    return {name: v[:: max(1, len(v) // most)].to("cpu", torch.float64, copy=True) for name, v in flat.items()}
