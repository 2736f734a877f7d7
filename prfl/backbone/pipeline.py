"""What families in diffusers' pipeline format share: networks with their adapters and copies, conditions and sizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prfl.backbone import adapters
from prfl.backbone.base import Facts, LoraSpec
from prfl.backbone.checkpointing import Running
from prfl.backbone.condition import Ask, Condition, as_asks, check_asks
from prfl.backbone.dropout import dropping
from prfl.backbone.network import computing, joined, predictors
from prfl.backbone.pipeline_text import PipelineText
from prfl.utils.errors import PrflError
from prfl.utils.schedule import chain_sigmas

VAE = "vae"


class PipelineBackbone(ABC):
    """Networks that predict, a VAE and a text encoder; every base weight is frozen.

    Outside of ``with backbone.adapter(name)`` the frozen base is active.  With ``running.checkpointing`` other than
    ``none``, each block is computed again in the backward pass instead of keeping its activations (checkpointing.py);
    with ``running.offload``, what is kept waits in host memory.

    All weights can be trained, in place (``network.train_all``) or in a copy beside the frozen base
    (``network.add_copy``).  They are then float32, because small steps vanish in half precision, and compute in
    ``facts.dtype`` by autocast.

    A family adds the other members of the ``Backbone`` protocol, which base.py documents.
    """

    latent_group = 1
    """The latent frames after the first come in groups of this size."""

    def __init__(self, networks: Mapping[str, nn.Module], vae: nn.Module, text: PipelineText, facts: Facts) -> None:
        self.facts, self.text, self.running = facts, text, Running()
        self.networks: dict[str, nn.Module] = {**networks, VAE: vae}
        for network in self.networks.values():
            network.requires_grad_(False).eval()
        self.computing = dict(networks)  # the networks that compute now: copies, inside their adapter
        self.at = next(iter(networks), "")  # the name of the network that this call uses

    @property
    def network(self) -> Any:
        """The network that computes now: a trained copy, inside its adapter."""
        return self.computing[self.at]

    @property
    def vae(self) -> Any:
        return self.networks[VAE]

    @abstractmethod
    def velocity(
        self, latents: Float[Tensor, "b c t h w"], sigma: Float[Tensor, "*sigma"], condition: Condition
    ) -> Float[Tensor, "b c t h w"]: ...

    @abstractmethod
    def features(
        self,
        latents: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "*sigma"],
        condition: Condition,
        blocks: Sequence[int],
    ) -> list[Float[Tensor, "b tokens width"]]: ...

    @abstractmethod
    def encode(self, pixels: Float[Tensor, "b 3 f H W"]) -> Float[Tensor, "b c t h w"]: ...

    @abstractmethod
    def decode(
        self, latents: Float[Tensor, "b c t h w"], shown: Sequence[int] | None = None
    ) -> Float[Tensor, "b 3 f H W"]: ...

    # ------------------------------------------------------------------------------------------------- the condition

    def condition(self, asks: Sequence[str]) -> Condition:
        """Encode asks as the pipeline does, or look them up if the prompt cache has all of them; "" is the
        unconditional.

        Raises PrflError for an ask with an image that the model does not take, or without one that it needs.
        """
        samples = as_asks(asks)
        check_asks(samples, self.facts.takes)
        if samples and all(ask in self.text.known for ask in samples):
            return Condition.cat([self.text.known[ask] for ask in samples]).to(self.facts.device)
        return self.encode_asks(samples)

    def encode_asks(self, asks: Sequence[Ask]) -> Condition:
        return self.text.encode(asks, self.facts.device, self.facts.dtype)

    # ------------------------------------------------------------------------------------------------- the chain

    def sigmas(self, steps: int, shape: Sequence[int], shift: float | None = None) -> Float[Tensor, " n"]:
        return chain_sigmas(steps, self.facts.shift if shift is None else shift)

    def start(
        self, noise: Float[Tensor, "b c t h w"], condition: Condition, sigma: float
    ) -> Float[Tensor, "b c t h w"]:
        return noise

    def precision(self, weight: Tensor) -> AbstractContextManager:
        """Autocast to ``facts.dtype`` if the weights, of which this is one, are in a wider dtype."""
        wider = weight.dtype != self.facts.dtype
        return torch.autocast(self.facts.device.type, self.facts.dtype) if wider else nullcontext()

    # ------------------------------------------------------------------------------------------------- sizes

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (channels, t, h, w) of a video's latents; PrflError if the model cannot take the size."""
        patch_t, *patches = self.facts.patch
        spatial, temporal = self.facts.spatial_factor, self.facts.temporal_factor
        for name, size, patch in zip(("height", "width"), (height, width), patches, strict=True):
            unit = spatial * patch
            if size < unit or size % unit:
                raise PrflError(f"a {name} of {size} is not a multiple of {unit}", fix=nearest(size, unit, unit))
        time, group = (frames - 1) // temporal + 1, self.latent_group
        if frames < 1 or (frames - 1) % (temporal * group) or time % patch_t:
            fix = nearest(frames, temporal * patch_t * group, temporal * (patch_t - 1) + 1)
            raise PrflError(f"{frames} frames: the VAE takes 1 frame and then groups of {temporal * group}", fix=fix)
        return self.facts.latent_channels, time, height // spatial, width // spatial

    # ------------------------------------------------------------------------------------------------- adapters

    def add_adapter(self, name: str, spec: LoraSpec) -> None:
        """See ``adapters.add_lora``.  The adapter is trainable and not active."""
        chosen = {
            key: network for key, network in predictors(self).items() if key in (spec.networks or self.facts.blocks)
        }
        for key, network in chosen.items():  # raises before any network is changed
            adapters.matching_layers(network, spec, self.facts.blocks[key])
        for key, network in chosen.items():
            adapters.add_lora(network, name, spec, self.facts.blocks[key])
            for parameter in adapters.adapter_parameters(network, name).values():
                parameter.data = parameter.data.to(self.facts.device)  # the base may wait on the host

    @contextmanager
    def adapter(self, name: str | None, dropout: Int[Tensor, " b"] | None = None) -> Iterator[None]:
        """Select an adapter (None: the frozen base) for forward and backward: see ``adapters.use_adapter``.

        Copies of all weights compute inside.  dropout: see dropout.py.
        """
        before = self.computing
        self.computing = computing(self, name)
        having = self._having(name)
        try:
            with ExitStack() as stack:
                for key, network in self.computing.items():
                    lora = name if key in having and network is self.networks[key] else None
                    layers = adapters.dropouts_of(network, lora) if lora and dropout is not None else []
                    stack.enter_context(adapters.use_adapter(network, lora))
                    if layers and dropout is not None:
                        stack.enter_context(dropping(layers, dropout))
                yield
        finally:
            self.computing = before

    @property
    def active_adapter(self) -> str | None:
        active = [adapters.active_adapter(network) for network in self.computing.values()]
        return next(filter(None, active), None)

    def parameters(self, name: str | None) -> dict[str, nn.Parameter]:
        """Return an adapter's or a copy's parameters; None: the base's weights that are trained in place."""
        having = self._having(name)
        trained = {
            key: self._trained(key, network, name) for key, network in computing(self, name).items() if key in having
        }
        return joined(trained, next(iter(self.facts.blocks), None))

    def _having(self, name: str | None) -> list[str]:
        """List the networks that have the adapter or copy.  If none has, list all: each then raises what is missing."""
        having = [key for key, network in computing(self, name).items() if self._has(key, network, name)]
        return having or list(self.facts.blocks)

    def _has(self, key: str, network: nn.Module, name: str | None) -> bool:
        return name is None or network is not self.networks[key] or adapters.has_adapter(network, name)

    def _trained(self, key: str, network: nn.Module, name: str | None) -> dict[str, nn.Parameter]:
        if name is not None and network is self.networks[key]:
            return adapters.adapter_parameters(network, name)
        return {path: parameter for path, parameter in network.named_parameters() if parameter.requires_grad}


def nearest(size: int, unit: int, smallest: int) -> str:
    below = max(size - smallest, 0) // unit * unit + smallest
    return f"take {below} or {below + unit}"
