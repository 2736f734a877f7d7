"""Wan 2.2 T2V-A14B: two transformers of Wan 2.1's layout that share the chain, the second for its last steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5EncoderModel

from prfl.backbone.base import Facts
from prfl.backbone.experts import Experts
from prfl.backbone.family import Family, FileOfNetwork
from prfl.backbone.fingerprint import SAMPLED, fingerprint, settings_fingerprint
from prfl.backbone.source import Source, vae_dtype
from prfl.backbone.wan import vae as vae_codec
from prfl.backbone.wan.facts import read_facts
from prfl.backbone.wan.family import ARCHITECTURES, WAN
from prfl.backbone.wan.loading import check_reads_text, check_vae, has_two, read_schedule
from prfl.backbone.wan.model import WanBackbone
from prfl.backbone.wan.text import WanText
from prfl.utils.errors import PrflError

HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"
AGAIN = "save the pipeline again, with transformer, transformer_2 and a boundary_ratio"


class WanExpertsBackbone(Experts, WanBackbone):
    """A Wan 2.2 A14B model.  Made by ``load_backbone``; every base weight is frozen."""


def load(source: Source, dtype: torch.dtype) -> WanExpertsBackbone:
    """A Wan 2.2 text-to-video model of two transformers.  Raises PrflError where they do not belong together."""
    networks, vae, facts = load_parts(source, dtype)
    for network in networks.values():
        check_reads_text(network, source.name)
    if source.device.type == "cpu":
        vae_codec.channels_last(vae)
    text = WanText(*source.text_loaders(UMT5EncoderModel, dtype))
    return WanExpertsBackbone(networks, vae, text, replace(facts, family="wan_experts"))


def load_parts(source: Source, dtype: torch.dtype) -> tuple[dict[str, WanTransformer3DModel], AutoencoderKLWan, Facts]:
    """The transformers, the VAE, and the facts of both but for their family."""
    schedule, boundary = read_schedule(source), boundary_of(source.index, source.name)
    networks = {name: source.load(WanTransformer3DModel, name, dtype) for name in (HIGH_NOISE, LOW_NOISE)}
    check_alike(networks, source.name)
    vae = source.load(AutoencoderKLWan, "vae", vae_dtype(dtype))
    check_vae(vae, source.name)
    return networks, vae, facts_of(source, networks, vae, schedule, boundary)


def boundary_of(index: Mapping[str, Any], where: str) -> float:
    """The sigma from which on the first transformer predicts."""
    boundary = index.get("boundary_ratio")
    if boundary is None or not 0 < boundary < 1 or index.get(LOW_NOISE) in (None, [None, None]):
        what = f"two transformers need a boundary_ratio between 0 and 1: it is {boundary}"
        if index.get(LOW_NOISE) in (None, [None, None]):
            what = f"a boundary_ratio of {boundary} is for two transformers, and there is no {LOW_NOISE}"
        raise PrflError(what, where=f"{where}/model_index.json", fix=AGAIN)
    return float(boundary)


def check_alike(networks: Mapping[str, WanTransformer3DModel], where: str) -> None:
    """Raise PrflError unless both transformers have one layout."""
    first, second = (dict(network.config) for network in networks.values())
    if wrong := [name for name in first if not name.startswith("_") and first[name] != second.get(name)]:
        name = wrong[0]
        what = f"the two transformers differ in {name}: {first[name]} and {second.get(name)}"
        raise PrflError(what, where=where, fix="give a folder whose transformers are of one model")


def facts_of(
    source: Source,
    networks: Mapping[str, WanTransformer3DModel],
    vae: AutoencoderKLWan,
    schedule: tuple[float, float],
    boundary: float,
) -> Facts:
    high, low = networks.values()
    facts = read_facts(source, high, vae, schedule)
    taking_turns = {"boundary": boundary}
    return replace(
        facts,
        identity={**facts.identity, **taking_turns, f"{LOW_NOISE}_fingerprint": fingerprint(low, most=SAMPLED)},
        settings=settings_fingerprint({"of_one": facts.settings, **taking_turns}, names=("of_one", "boundary")),
        blocks=dict.fromkeys(networks, ("blocks",)),
        boundary=boundary,
        device=source.device,
    )


WAN_EXPERTS = Family(
    pipeline="WanPipeline",
    network="WanTransformer3DModel",
    fits=has_two,
    load=load,
    lora=replace(
        WAN.lora,
        implementation="https://github.com/Wan-Video/Wan2.2",
        use="In ComfyUI put both files into `models/loras` and load each with LoraLoaderModelOnly at strength 1, "
        "behind the model of its name.",
        of_networks={
            HIGH_NOISE: FileOfNetwork("high_noise"),
            LOW_NOISE: FileOfNetwork("low_noise", "load_into_transformer_2=True"),
        },
    ),
    shipped={"Wan-AI/Wan2.2-T2V-A14B-Diffusers": ARCHITECTURES / "wan2.2-a14b"},
    condition_in_loop=WAN.condition_in_loop,
)
