"""One LoRA file: diffusers computes the trained adapter bit for bit from it, and ComfyUI finds every layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file

from prfl.backbone import LoraSpec
from prfl.backbone.adapters import matching_layers
from prfl.backbone.wan.family import WAN
from prfl.backbone.wan.lora_names import original_name
from prfl.export import export_run
from prfl.export.lora import shared_file_tensors
from prfl.export.run import run_config
from prfl.factory.backbone import POLICY, build_backbone
from prfl.factory.policy import load_policy
from prfl.utils.errors import PrflError

EVERYTHING = [
    "to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "time_embedder.linear_1", "time_proj",
    "text_embedder.linear_1", "text_embedder.linear_2", "proj_out",
]  # fmt: skip


def outputs(network, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 2, 4, 4, generator=generator)
    text = torch.randn(2, 512, 16, generator=generator)
    with torch.no_grad():
        return network(latents, torch.tensor([300.0, 900.0]), text, return_dict=False)[0]


@pytest.mark.parametrize(
    "adapter", [{"targets": EVERYTHING}, {"targets": ["to_q"], "rank": 8, "alpha": 1}], ids=["everything", "to_q"]
)
def test_diffusers_loads_exactly_what_was_trained(
    tiny_run: Callable[..., Path], tiny_pipeline_folder: Path, adapter: dict
) -> None:
    run = tiny_run(**adapter)
    file = export_run(run) / "tiny-run.safetensors"
    pipeline = WanPipeline.from_pretrained(tiny_pipeline_folder)
    base = outputs(pipeline.transformer)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)

    config = run_config(run)
    model = build_backbone(config)
    load_policy(config, model)
    with model.adapter(POLICY):
        # The same attention processor as the pipeline's: ours folds the padding, which rounds otherwise.
        model.transformer.set_attn_processor(pipeline.transformer.blocks[0].attn1.processor)
        trained = outputs(model.transformer.to("cpu"))  # where the pipeline is
    assert torch.equal(outputs(pipeline.transformer), trained)
    assert (trained - base).abs().max() > 0.01, "the adapter does something"


def test_an_alpha_that_cannot_be_folded_exactly_is_close(
    tiny_run: Callable[..., Path], tiny_pipeline_folder: Path
) -> None:
    """alpha / rank = 5 / 3: diffusers rounds when it scales A."""
    run = tiny_run(rank=3, alpha=5)
    pipeline = WanPipeline.from_pretrained(tiny_pipeline_folder)
    pipeline.load_lora_weights(export_run(run), weight_name="tiny-run.safetensors")
    export_run(run, merged=True)
    merged = type(pipeline.transformer).from_pretrained(run / "export" / "transformer")
    torch.testing.assert_close(outputs(merged), outputs(pipeline.transformer), rtol=1e-4, atol=1e-5)


def test_every_linear_layer_has_the_name_of_the_published_checkpoint(tiny_backbone) -> None:
    """Against diffusers' converter of the original Wan checkpoints, whose names ComfyUI's model has."""
    layers = matching_layers(tiny_backbone.transformer, LoraSpec(1, 1, EVERYTHING), ["blocks"])
    assert len(layers) == 3 * 10 + 5
    original = {f"{original_name(layer)}.weight": torch.tensor(index) for index, layer in enumerate(layers)}
    converted = convert_wan_transformer_to_diffusers(dict(original))
    assert {name.removesuffix(".weight"): int(index) for name, index in converted.items()} == {
        layer: index for index, layer in enumerate(layers)
    }


def test_keys_that_comfyui_reads(tiny_run: Callable[..., Path]) -> None:
    """comfy/lora.py: ``diffusion_model.`` + the layer's name in comfy/ldm/wan/model.py; comfy/weight_adapter/lora.py:
    ``lora_A``, ``lora_B`` (rank, in) and (out, rank), and ``alpha``, by which the update is alpha / rank."""
    file = export_run(tiny_run(targets=EVERYTHING)) / "tiny-run.safetensors"
    tensors = load_file(file)
    layers = {key.rsplit(".lora_A.", 1)[0] for key in tensors if ".lora_A." in key}
    published = {"self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k"}
    published |= {"cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2"}
    inside = {f"diffusion_model.blocks.{block}.{layer}" for block in range(3) for layer in published}
    outside = {"time_embedding.0", "time_projection.1", "text_embedding.0", "text_embedding.2", "head.head"}
    assert layers == inside | {f"diffusion_model.{layer}" for layer in outside}
    saved = load_file(file.parents[1] / "policy.safetensors")
    for ours, theirs in (("blocks.1.attn2.to_out.0", "blocks.1.cross_attn.o"), ("proj_out", "head.head")):
        key = f"diffusion_model.{theirs}"
        down, up = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
        scale = tensors[f"{key}.alpha"].item() / len(down) if f"{key}.alpha" in tensors else 1.0
        trained = saved[f"{ours}.lora_B.weight"] @ saved[f"{ours}.lora_A.weight"] * (2 / 4)
        assert torch.equal(up @ down * scale, trained)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == "wan2.1/lora"


def test_half_size_in_bfloat16(tiny_run: Callable[..., Path]) -> None:
    run = tiny_run()
    tensors = load_file(export_run(run, dtype="bfloat16", name="small") / "small.safetensors")
    assert {t.dtype for key, t in tensors.items() if key.endswith(".weight")} == {torch.bfloat16}
    assert {t.dtype for key, t in tensors.items() if key.endswith(".alpha")} == {torch.float32}


def test_layers_that_the_file_cannot_hold() -> None:
    weights = torch.ones(2, 2)
    with pytest.raises(PrflError, match="blocks.0.attn2.norm_added_k has no name in the original"):
        original_name("blocks.0.attn2.norm_added_k")
    with pytest.raises(PrflError, match="leaves the blocks alone"):
        shared_file_tensors(WAN.lora, {"proj_out.lora_A.weight": weights, "proj_out.lora_B.weight": weights}, 2)
