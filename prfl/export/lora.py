"""A LoRA in one file that diffusers and ComfyUI both read: the original checkpoint's layer names, and ``.alpha``.

    diffusion_model.blocks.0.self_attn.q.lora_A.weight    (rank, in)
    diffusion_model.blocks.0.self_attn.q.lora_B.weight    (out, rank)
    diffusion_model.blocks.0.self_attn.q.alpha            (): the update is B A x * alpha / rank

Source: ComfyUI names a layer as the model's original checkpoint does, after ``diffusion_model.`` (comfy/lora.py,
``model_lora_keys_unet``), and scales by alpha / rank, or by 1 without ``.alpha`` (comfy/weight_adapter/lora.py).
diffusers turns the same names into its own and does the same with ``.alpha``, but inside the blocks only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prfl.backbone.family import LoraFile
from prfl.backbone.network import split
from prfl.factory import provenance
from prfl.factory.provenance import Stamp
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write


def shared_file_tensors(
    form: LoraFile, state: Mapping[str, Tensor], alpha: int | float, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Make the tensors of the file from an adapter's state, keyed ``blocks.0.attn1.to_q.lora_A.weight``.

    In float32 and with alpha / rank a power of two, diffusers computes the trained adapter bit for bit; it multiplies A
    by that factor when it loads, which rounds otherwise.  Raises PrflError for a layer that one of the two cannot name.
    """
    tensors: dict[str, Tensor] = {}
    layers = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    if form.alpha_below and not any(layer.startswith(form.alpha_below) for layer in layers):
        raise PrflError(
            "diffusers reads no LoRA that leaves the blocks alone",
            where="backbone.adapter.targets",
            fix="export merged weights (--merged)",
        )

    for layer in layers:
        down, up = state[f"{layer}.lora_A.weight"].float(), state[f"{layer}.lora_B.weight"].float()
        key = form.prefix + form.original_name(layer)
        if form.alpha_below and layer.startswith(form.alpha_below):
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
        else:  # diffusers takes no `.alpha` here, so the factor goes into B
            up = up * (alpha / len(down))
        tensors[f"{key}.lora_A.weight"] = down.to(dtype).contiguous()
        tensors[f"{key}.lora_B.weight"] = up.to(dtype).contiguous()
    return tensors


def write_lora_files(
    folder: Path,
    name: str,
    form: LoraFile,
    state: Mapping[str, Tensor],
    networks: Sequence[str],
    **options: Any,
) -> list[Path]:
    """Write NAME.safetensors; of a model of several networks a file of each that has the adapter, as its form calls it.

    networks: of the model; the keys of all but the first begin with their names.  options: of ``write_shared_file``.
    """
    if len(networks) == 1:
        parts = {folder / f"{name}.safetensors": dict(state)}
    else:
        of_each = split(state, networks)
        parts = {folder / f"{name}_{form.of_networks[key].ending}.safetensors": part for key, part in of_each.items()}
    for path, part in parts.items():
        write_shared_file(path, form, part, **options)
    return list(parts)


def write_shared_file(
    path: Path,
    form: LoraFile,
    state: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: int | float,
    dtype: torch.dtype = torch.float32,
    made_by: Stamp | None = None,
) -> None:
    """Write the file, atomically.  made_by: what made the policy (``prfl.factory.provenance``), which stays with it.

    The metadata follow modelspec (github.com/Stability-AI/ModelSpec), which model browsers show.
    """
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": form.architecture,
        "modelspec.implementation": form.implementation,
        "modelspec.title": path.stem,
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
    }
    tensors = shared_file_tensors(form, state, alpha, dtype)
    if made_by:
        metadata |= provenance.metadata({**made_by, "weights": provenance.tensors_hash(tensors)})
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
