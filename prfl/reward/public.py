"""Rewards that others trained, in files of their own form: what one has to have, what ours share, several at once.

The config sections are in config/sections/public_rewards.py, their lines in factory/reward.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from prfl.backbone.condition import Condition
from prfl.backbone.weights import check_finite
from prfl.config.section import is_hub_id
from prfl.reward.look import FRAMES_AT_ONCE
from prfl.reward.scores import Normalisation, Scores
from prfl.utils.errors import PrflError
from prfl.utils.hub import causes, hub_error
from prfl.utils.reading import absent

R = TypeVar("R", bound="FrozenReward")


@runtime_checkable
class PublicReward(Protocol):
    """A frozen reward on decoded pixels, about [-1, 1] and unclamped, differentiable in them."""

    space: str
    noise_aware: bool

    @property
    def differentiable(self) -> bool: ...

    @property
    def normalisation(self) -> Normalisation: ...

    @property
    def dimensions(self) -> tuple[str, ...]: ...

    @property
    def frames_at_once(self) -> int | None:
        """Frames whose activations are alive together in the backward pass; None is all."""
        ...

    @property
    def card(self) -> None:
        """Nobody measured how well it ranks the run's videos."""
        ...

    def __call__(
        self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None
    ) -> Scores: ...

    def logits(
        self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None
    ) -> Scores: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class FrozenReward:
    """What this package's public rewards share.  A subclass has ``__call__``; its scores are used as they are.

    dimensions: the names of its scores.  networks: frozen here.
    """

    space = "pixel"
    noise_aware = False
    differentiable = True
    frames_at_once: int | None = FRAMES_AT_ONCE
    card = None

    def __init__(self, dimensions: Sequence[str], *networks: nn.Module) -> None:
        self.dimensions = tuple(dimensions)
        self.networks = [network.requires_grad_(False).eval() for network in networks]

    @property
    def normalisation(self) -> Normalisation:
        return Normalisation.none(self.dimensions)

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        raise NotImplementedError

    def logits(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        return self(pixels, condition, times)

    def to(self: R, device: torch.device | str) -> R:
        for network in self.networks:
            network.to(device)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        for network in self.networks:
            yield from network.parameters()


def load_error(name: str, error: Exception, what: str, kind: str, fix: str) -> PrflError:
    """Make the error of what transformers cannot load: what the hub says, or what is wrong with the folder.

    what: that which was loaded, as "tokenizer".  kind: what the hub id should be of, as "CLIPModel, as openai/...".
    """
    hub_is_to_blame = any(isinstance(cause, HfHubHTTPError | LocalEntryNotFoundError) for cause in causes(error))
    if is_hub_id(name) and hub_is_to_blame:
        return hub_error(name, error, kind)
    if not is_hub_id(name) and not Path(name).is_dir():
        return absent(Path(name), fix, "folder")
    reason = str(error).strip().split("\n")[0]
    return PrflError(f"cannot load the {what}: {reason}", where=name, fix=fix)


def load_network(
    kind: type[Any], name: str, revision: str | None, example: str, dtype: torch.dtype = torch.float32
) -> Any:
    """Load a whole network of transformers, from a folder or hub id, safetensors only.

    kind: its class.  example: a hub id of one, for the error.
    Raises PrflError where there is none, or not all of it, or a weight is not finite.
    """
    what = kind.__name__
    fix = f"give the folder or hub id of a {what} in transformers' format with safetensors: {example}"
    try:
        network, report = kind.from_pretrained(
            name, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise load_error(name, error, what, f"{what}, as {example}", fix) from error

    if report["missing_keys"]:  # transformers leaves these at random values
        keys = ", ".join(sorted(report["missing_keys"])[:3])
        raise PrflError(f"is no {what}, or not all of one: it has no {keys}, ...", where=name, fix=fix)
    check_finite(dict(network.named_parameters()), name, "download it again")
    return network
