"""A family of a test: two small networks, one for the first half of the chain and one for the second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from prfl.backbone.blocks import hidden_states
from prfl.backbone.condition import Condition, TensorSpec
from prfl.backbone.family import Family, LoraFile
from prfl.backbone.fingerprint import fingerprint
from prfl.backbone.pipeline import PipelineBackbone
from prfl.backbone.pipeline_text import PipelineText
from prfl.backbone.source import Source
from tests.toy_facts import toy_facts

WIDTH, BLOCKS = 6, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.to_q(x))


class Network(ModelMixin, ConfigMixin, PeftAdapterMixin):
    @register_to_config
    def __init__(self, num_layers: int = BLOCKS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(num_layers)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Lengths(PipelineText):
    """A prompt's condition is its length."""

    most = 8

    def encode(self, asks, device, dtype):
        return Condition({"text": torch.tensor([[len(ask.prompt) / 10] for ask in asks], dtype=dtype)}, tuple(asks))


class TwoNetworks(PipelineBackbone):
    """Latents are (b, 6, t, h, w); a network sees each position by itself.  Above sigma 0.5 the first one predicts."""

    def _at(self, sigma):
        return self.computing["transformer" if float(sigma.max()) > 0.5 else "transformer_2"]

    def _inputs(self, latents, sigma, condition):
        text = condition.tensors["text"][:, 0, None, None, None, None]
        return (latents + text + sigma.reshape(-1, 1, 1, 1, 1)).to(self.facts.dtype).movedim(1, -1)

    def velocity(self, latents, sigma, condition):
        network, x = self._at(sigma), self._inputs(latents, sigma, condition)
        with self.precision(next(network.parameters())):
            return network(x).movedim(-1, 1).to(latents.dtype)

    def features(self, latents, sigma, condition, blocks):
        network, x = self._at(sigma), self._inputs(latents, sigma, condition)
        return [state.flatten(1, 3) for state in hidden_states(lambda: network(x), list(network.blocks), blocks)]

    def encode(self, pixels):
        return pixels.repeat(1, 2, 1, 1, 1)

    def decode(self, latents, shown=None):
        return latents[:, :3] if shown is None else latents[:, :3, list(shown)]


def load(source: Source, dtype: torch.dtype) -> TwoNetworks:
    networks = {name: source.load(Network, name, dtype) for name in ("transformer", "transformer_2")}
    prints = {f"{name}_fingerprint": fingerprint(network) for name, network in networks.items()}
    facts = toy_facts(
        family="two",
        blocks=dict.fromkeys(networks, ("blocks",)),
        widths=(WIDTH,) * BLOCKS,
        identity={"model_id": "two", "width": WIDTH, **prints, "vae_fingerprint": "0"},
        condition={"text": TensorSpec((1,), dtype)},
        latent_channels=WIDTH,
        device=source.device,
        dtype=dtype,
        vae_dtype=dtype,
    )
    return TwoNetworks(networks, nn.Identity(), Lengths(lambda: (None, nn.Identity())), facts)


TWO = Family(
    pipeline="TwoPipeline",
    network="Network",
    load=load,
    lora=LoraFile(prefix="", original_name=str, alpha_below=(), architecture="two", implementation=""),
)


def save_two_networks(folder: Path) -> Path:
    """A model in the ordinary folder format: model_index.json, and a folder for each network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ("transformer", "transformer_2"):
            Network().save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "TwoPipeline"}))
    return folder
