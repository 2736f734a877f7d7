"""What every family of video models gives to the rest of the package: the ``Backbone`` protocol and its ``Facts``.

One convention holds for all of them.  sigma = 1 is noise and sigma = 0 is data; latents at sigma are
``x = (1 - sigma) x0 + sigma noise``; the velocity is ``noise - x0``.  A network that predicts the noise or v on another
path is turned into this form by its family (flow_form.py), and timesteps are the family's own business.

Shapes: latents are (b, *state), where state is (c, t, h, w) of a video, normalised; images have t = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prfl.backbone.checkpointing import Running
from prfl.backbone.condition import Ask, Condition, TensorSpec
from prfl.utils.errors import PrflError

SIGMA_CONVENTION = "x = (1 - sigma) x0 + sigma noise; v = noise - x0"


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA adapter: the update of a layer is B A x * alpha / rank.

    targets: endings of layer names, such as ``to_q`` or ``ffn.net.2``.
    blocks: the blocks that get it; None is all of them, and the layers outside of the blocks.
    networks: of several networks, those that get it; None is all.
    seed: of the random A.  dropout: see dropout.py.
    """

    rank: int
    alpha: int | float
    targets: Sequence[str]
    dropout: float = 0.0
    blocks: Sequence[int] | None = None
    seed: int = 0
    networks: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts of the model, read once when it is loaded: plain data.

    family: the name of its package below prfl/backbone.  model_id: a hub id, or a folder's name.
    identity: JSON-able facts by which a reward head or a cache recognises the model that it was made with.  Each
    network has a ``NETWORK_fingerprint`` of its base weights, rounded to bfloat16, so that the dtype in which they
    were loaded does not matter.
    settings: a hash of the settings that change the numbers which the same weights give.
    schedule: the numbers from which sigmas and timesteps follow.

    blocks: for each network that predicts, the names of its lists of blocks, in the order in which they run.
    widths: the width of the tokens behind each block.  head_size: channels of an attention head.
    kernels: operations that prfl_kernels has for the family.  attention: those of ``attention.NAMES`` that can run it.
    lean_group: how many blocks are best recomputed together when all kernels run.

    condition: the tensors of a condition, by name.  text_tokens: tokens at which a prompt is cut.
    text_width: width of the text's embeddings.
    text_identity: tells text encoders apart; empty for a hub model, which its id identifies.
    takes: what an Ask may hold: "text", "image".

    latent_channels: channels of the latents.  patch: (t, h, w) latents of a token.
    spatial_factor: pixels of a latent, in height and in width.
    temporal_factor: pixel frames of each latent frame but the first.
    prefix_decodes: whether the first latent frames decode to the same pixels without the later ones.
    shift: the shift of the sigmas, as in the pipeline.  If they follow from a table of timesteps, the shift that comes
    closest to the table.
    device, dtype: of the computation.  vae_dtype: of the VAE's computation.
    strides: for each block, how many latents a token behind it covers in height and in width; empty if all blocks have
    all tokens.
    variance_preserving: whether the flow is made from a variance-preserving path, whose chains may end before sigma 0
    (``flow_form.ended``).
    boundary: the sigma at and above which the first of two networks predicts (experts.py); None with one network.
    """

    family: str
    model_id: str
    revision: str | None
    identity: Mapping[str, Any]
    settings: str
    schedule: tuple[float, ...]
    blocks: Mapping[str, tuple[str, ...]]
    widths: tuple[int, ...]
    head_size: int
    condition: Mapping[str, TensorSpec]
    text_tokens: int
    text_width: int
    text_identity: str
    latent_channels: int
    patch: tuple[int, int, int]
    spatial_factor: int
    temporal_factor: int
    prefix_decodes: bool
    shift: float
    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    takes: frozenset[str] = frozenset({"text"})
    kernels: tuple[str, ...] = ()
    attention: tuple[str, ...] = ("sdpa",)
    lean_group: int = 1
    strides: tuple[int, ...] = ()
    variance_preserving: bool = False
    boundary: float | None = None

    @property
    def num_blocks(self) -> int:
        return len(self.widths)

    @property
    def usual_block(self) -> int:
        """The block behind which a head reads by default: at a fifth of the depth (PRFL), or a UNet's middle."""
        return self.num_blocks // 2 if self.strides else max(1, self.num_blocks // 5) - 1

    def width_after(self, blocks: Sequence[int]) -> int:
        """The width of the tokens behind these blocks.  Raises PrflError for a missing block, or if widths differ."""
        if not blocks or not set(blocks) <= set(range(self.num_blocks)):
            raise PrflError(
                f"the backbone has blocks 0 to {self.num_blocks - 1}, asked for {list(blocks)}",
                where="reward.head.blocks",
                fix="name one or more of them",
            )
        widths = {self.widths[block] for block in blocks}
        if len(widths) > 1:
            what = f"the tokens behind blocks {list(blocks)} have widths {sorted(widths)}"
            raise PrflError(what, where="reward.head.blocks", fix="name blocks of one width")
        strides = {self.strides[block] for block in blocks if self.strides}
        if len(strides) > 1:
            what = f"a token behind blocks {list(blocks)} is {sorted(strides)} latents wide"
            raise PrflError(what, where="reward.head.blocks", fix="name blocks of one shape")
        return widths.pop()

    def tokens(self, state: Sequence[int]) -> int:
        """Tokens of latents of the state (c, t, h, w)."""
        grid = [size // patch for size, patch in zip(state[1:], self.patch, strict=True)]
        return grid[0] * grid[1] * grid[2]


@runtime_checkable
class Text(Protocol):
    """The text encoders of a backbone.  They are loaded when they are first needed."""

    known: dict[Ask, Condition]
    """The prompt cache, on the host: ``Backbone.condition`` looks here first."""

    def encoder(self) -> nn.Module:
        """The encoders as one module."""

    def unknown(self) -> int | None:
        """The token for words that the tokenizer does not know; None if it knows every word."""

    def tokens(self, prompts: Sequence[str], *, cut: bool = True) -> list[tuple[int, ...]]:
        """The tokens of each prompt; with ``cut`` only as many as the encoder reads.

        Only the tokenizer is loaded.  Raises PrflError if it cannot be.
        """

    def free(self) -> None:
        """Free the encoders' memory.  The next prompt that is not cached loads them again."""


@runtime_checkable
class Backbone(Protocol):
    """A video model whose base weights are frozen, with adapters on it.  Outside ``adapter(name)`` the base computes.

    It has at most 15 members.  Everything else about a model is a fact, or a function of its networks (network.py).
    """

    facts: Facts

    running: Running
    """How it computes, with the same results: checkpointing, offload, kernels.  May change between calls."""

    networks: dict[str, nn.Module]
    """All networks but the text encoders, by their folder in the pipeline: ``transformer`` (``transformer_2``),
    ``vae``.  A trained copy of all weights has its adapter's name in front: ``policy/transformer``.  A VAE that was
    moved to the host returns to the device when it is next used."""

    @property
    def text(self) -> Text: ...

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """The shape (c, t, h, w) of a video's latents.  Raises PrflError for a size that the model cannot take."""

    def sigmas(self, steps: int, shape: Sequence[int], shift: float | None = None) -> Float[Tensor, " n"]:
        """The ``steps`` + 1 sigmas of a chain, float64, falling.

        shape: of the latents; some families shift by it.  shift: None is the model's own.
        """

    def condition(self, asks: Sequence[str]) -> Condition:
        """Encode asks on the device.  A plain prompt is an ask; the prompt "" is the unconditional one.

        Raises PrflError for an ask that holds what the family does not take, or lacks what it needs.
        """

    def start(self, noise: Float[Tensor, b * state], condition: Condition, sigma: float) -> Float[Tensor, b * state]:
        """Make a chain's starting latents: standard normal noise, scaled to the chain's first sigma, and with the first
        frame in its place if the condition has one."""

    def velocity(
        self, latents: Float[Tensor, b * state], sigma: Float[Tensor, "*sigma"], condition: Condition
    ) -> Float[Tensor, b * state]:
        """Predict noise - x0 at these latents, in their dtype.  sigma: (b,) or (), always in float32."""

    def features(
        self,
        latents: Float[Tensor, b * state],
        sigma: Float[Tensor, "*sigma"],
        condition: Condition,
        blocks: Sequence[int],
    ) -> list[Float[Tensor, "b tokens width"]]:
        """Compute the video's tokens behind each of ``blocks`` (0 is the first), in that order; later blocks do not
        run.

        Raises PrflError for a block that does not exist.
        """

    def encode(self, pixels: Float[Tensor, "b 3 f H W"]) -> Float[Tensor, b * state]:
        """Encode pixels in [-1, 1] to normalised latents (the posterior's mean), in the VAE's dtype."""

    def decode(
        self, latents: Float[Tensor, b * state], shown: Sequence[int] | None = None
    ) -> Float[Tensor, "b 3 f H W"]:
        """Decode normalised latents to *unclamped* pixels, in the VAE's dtype, differentiably.

        shown: the latent frames, ascending, whose pixels are returned and which get gradient; None is all.  If the VAE
        can decode a part, it computes no more than it must.  ``frames.pixel_frames`` says which pixel frames these are.
        """

    def add_adapter(self, name: str, spec: LoraSpec) -> None:
        """Add a trainable adapter that changes nothing yet, and is not active.

        Raises PrflError for a name that exists already, targets that match no layer, and blocks that do not exist.
        """

    def adapter(self, name: str | None, dropout: Int[Tensor, " b"] | None = None) -> AbstractContextManager:
        """Select an adapter or a trained copy (None: the base) in all networks, for forward *and* backward.

        Contexts nest.  A network without the adapter computes as the base.
        dropout: a seed for each sample, for the dropout of the adapter's inputs; None drops nothing.
        Raises PrflError if there is no such adapter.
        """

    def parameters(self, name: str | None) -> dict[str, nn.Parameter]:
        """The trained parameters of an adapter, by names such as ``blocks.0.attn1.to_q.lora_A.weight``; those of a
        second network begin with its name.  None: the base's weights, if they are trained in place."""
