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

    targets: endings of layer names, such as ``to_q`` or ``ffn.net.2``.  blocks: only these; None is all of them and
    what lies outside the blocks.  seed: of the random A.  dropout: see dropout.py.  networks: of several, those that
    get it; None is all.
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
    """What was read from the model once: plain data.

    family: the name of its package below prfl/backbone.  model_id: a hub id, or a folder's name.
    identity: JSON-able; what a reward head or a cache made with the model needs to find again, with a
    ``NETWORK_fingerprint`` of each network's base weights, rounded to bfloat16 so that the dtype they were loaded in
    does not matter.  settings: a hash of what changes the numbers that the same weights give.  schedule: what its
    sigmas and timesteps follow from.

    blocks: of each network that predicts, the names of its lists of blocks, in the order in which they run.
    widths: of the tokens behind each block.  head_size: channels of an attention head.
    kernels: operations that prfl_kernels has for the family.  attention: those of ``attention.NAMES`` that can run
    it.  lean_group: blocks that are best computed again together where all kernels run.

    condition: the tensors of its conditions.  text_tokens: where a prompt is cut.  text_width: of its embeddings.
    text_identity: tells text encoders apart; empty for a hub model, whose id says it.
    takes: what an Ask may hold: "text", "image".  embedded_guidance: the scale that the network itself was given in
    training, None where there is none.

    latent_channels, patch (t, h, w): of the latents.  spatial_factor: pixels of a latent, in height and width.
    temporal_factor: pixel frames of each latent frame but the first.
    prefix_decodes: whether the first latent frames decode alike without the later ones.
    shift: of the sigmas, the pipeline's own; where they follow from a table of timesteps, the shift that is like it.
    device, dtype: of the computation.  vae_dtype: of the VAE's.
    strides: of the tokens behind each block, latents that one is wide and high; empty where all blocks have all tokens.
    variance_preserving: a flow made of such a path, whose chains may end before data (``flow_form.ended``).
    boundary: the sigma from which on the first of two networks predicts (experts.py); None where none take turns.
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
    embedded_guidance: float | None = None
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
        """Behind which block a head reads where nothing is said: a fifth of the depth (PRFL), a UNet's middle."""
        return self.num_blocks // 2 if self.strides else max(1, self.num_blocks // 5) - 1

    def width_after(self, blocks: Sequence[int]) -> int:
        """The width of the tokens behind these blocks.  Raises PrflError where a block is missing, or widths differ."""
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
    """The text encoders of a backbone, which are loaded when they are first needed."""

    known: dict[Ask, Condition]
    """Encoded before, on the host: ``Backbone.condition`` looks here first."""

    def encoder(self) -> nn.Module:
        """The encoders as one module."""

    def unknown(self) -> int | None:
        """The token that stands for every word which the tokenizer does not know; None where it knows all."""

    def tokens(self, prompts: Sequence[str], *, cut: bool = True) -> list[tuple[int, ...]]:
        """The tokens of each prompt; with ``cut`` those that the encoder reads.

        Needs the tokenizer alone.  Raises PrflError where that cannot be loaded.
        """

    def free(self) -> None:
        """Free the encoders' memory; the next condition loads them again."""


@runtime_checkable
class Backbone(Protocol):
    """A video model whose base weights are frozen, with adapters on it.  Outside ``adapter(name)`` the base computes.

    At most 15 members: what else can be said of a model is a fact, or a function over its networks (network.py).
    """

    facts: Facts

    running: Running
    """How it computes, not what: checkpointing, what waits on the host, kernels.  May be changed between calls."""

    networks: dict[str, nn.Module]
    """All weights but the text encoders', by folder of the pipeline: ``transformer`` (and ``transformer_2``), ``vae``.
    A copy of all weights that is trained stands behind its adapter's name: ``policy/transformer``.  A VAE that was
    moved to the host comes back when it is next used."""

    @property
    def text(self) -> Text: ...

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """The state of a video's latents.  Raises PrflError for a size that the model cannot take."""

    def sigmas(self, steps: int, shape: Sequence[int], shift: float | None = None) -> Float[Tensor, " n"]:
        """The ``steps`` + 1 sigmas of a chain, float64, falling.

        shape: the state, by which some families shift.  shift: None is the model's own.
        """

    def condition(self, asks: Sequence[str]) -> Condition:
        """Encode asks, a prompt alone being one, on the device; the prompt "" is the unconditional one.

        Raises PrflError for an ask with something that the family does not take, or without what it needs.
        """

    def start(self, noise: Float[Tensor, b * state], condition: Condition, sigma: float) -> Float[Tensor, b * state]:
        """Where a chain starts: standard normal noise, scaled to the chain's first sigma, with the first frame in its
        place where the condition has one."""

    def velocity(
        self, latents: Float[Tensor, b * state], sigma: Float[Tensor, "*sigma"], condition: Condition
    ) -> Float[Tensor, b * state]:
        """noise - x0 at these latents, in their dtype.  sigma: (b,) or (), in float32 whatever the dtype."""

    def features(
        self,
        latents: Float[Tensor, b * state],
        sigma: Float[Tensor, "*sigma"],
        condition: Condition,
        blocks: Sequence[int],
    ) -> list[Float[Tensor, "b tokens width"]]:
        """The video's tokens behind each of ``blocks`` (0 is the first), in that order; later blocks are never run.

        Raises PrflError for a block that does not exist.
        """

    def encode(self, pixels: Float[Tensor, "b 3 f H W"]) -> Float[Tensor, b * state]:
        """Pixels in [-1, 1] to normalised latents (the posterior's mean), in the VAE's dtype."""

    def decode(
        self, latents: Float[Tensor, b * state], shown: Sequence[int] | None = None
    ) -> Float[Tensor, "b 3 f H W"]:
        """Normalised latents to *unclamped* pixels, in the VAE's dtype, differentiable.

        shown: the latent frames, ascending, whose pixels are wanted and that get gradient; None is all.  A VAE that may
        be decoded in part computes no more than it must.  Which pixel frames these are: ``frames.pixel_frames``.
        """

    def add_adapter(self, name: str, spec: LoraSpec) -> None:
        """Add a trainable adapter that changes nothing yet, and is not active.

        Raises PrflError for a name that is taken, targets that match no layer and blocks that do not exist.
        """

    def adapter(self, name: str | None, dropout: Int[Tensor, " b"] | None = None) -> AbstractContextManager:
        """Select an adapter, or a trained copy, (None: the base) for forward *and* backward, in all networks; nests.
        A network that lacks it computes as the base.

        dropout: a seed for each sample, by which the adapter's inputs are dropped at its rate, in forward and backward.
        Raises PrflError where there is no such adapter.
        """

    def parameters(self, name: str | None) -> dict[str, nn.Parameter]:
        """What is trained under an adapter, keyed ``blocks.0.attn1.to_q.lora_A.weight``; the keys of a second network
        begin with its name.  None: weights of the base that are trained in place."""
