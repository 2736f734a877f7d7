"""The diffusers Wan family, text to video: velocity, features with early exit, text condition, VAE and adapters.

The block loop is our own over the diffusers modules: features leave after the last block that is wanted, blocks can be
checkpointed with a guard on the adapter, and the padded text is folded (see ``condition.fold_padding``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from prfl.backbone import adapters
from prfl.backbone.cheaper import Cheaper, CheaperCalls, StepCache
from prfl.backbone.checkpointing import Checkpointing, one_after_another, run_block, stretches
from prfl.backbone.condition import Condition, FoldedTextProcessor, fold_padding, pad_to
from prfl.backbone.dropout import dropping
from prfl.backbone.fingerprint import SAMPLED, fingerprint, settings_fingerprint
from prfl.backbone.wan import vae as vae_codec
from prfl.backbone.wan.kernels import SWAPPED, use_kernels
from prfl.utils.errors import PrflError
from prfl.utils.host_store import HostStore

TEXT_TOKENS = 512  # WanPipeline pads every prompt to this many tokens, without a mask
SIGMA_CONVENTION = "x = (1 - sigma) x0 + sigma noise; v = noise - x0"


class WanBackbone:
    """A Wan text-to-video model.  Made by ``load_backbone``; every base weight is frozen.

    Outside ``with backbone.adapter(name)`` the frozen base is active.  ``checkpointing`` other than ``none`` computes
    each block again in the backward pass instead of keeping its activations (see checkpointing.py); with ``offload``
    what it does keep waits in host memory.

    All weights can be trained, in place (``train_all``) or in a copy beside the frozen base (``add_copy``).  They are
    float32 then, because a small step vanishes in a half precision, and compute in ``dtype`` by autocast.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        vae: AutoencoderKLWan,
        load_text: Callable[[], tuple[Any, UMT5EncoderModel]],
        *,
        load_tokenizer: Callable[[], Any] | None = None,
        model_id: str,
        revision: str | None,
        text_identity: str,
        default_shift: float,
        timestep_scale: float,
    ) -> None:
        self.transformer = self._base = transformer.requires_grad_(False).eval()
        self.vae = vae.requires_grad_(False).eval()
        self.dtype: torch.dtype = transformer.patch_embedding.weight.dtype
        self.copies: dict[str, WanTransformer3DModel] = {}
        self.model_id, self.revision, self.text_identity = model_id, revision, text_identity
        self.default_shift = default_shift
        self.checkpointing: Checkpointing = "none"
        # What each block keeps where they differ: of ``velocity``, and of ``features``.
        self.block_modes: tuple[Checkpointing, ...] | None = None
        self.feature_modes: tuple[Checkpointing, ...] | None = None
        self.offload = False
        self.kernels: frozenset[str] = frozenset()
        self.step_cache: StepCache | None = None
        self._load_text, self._timestep_scale = load_text, timestep_scale
        self._load_tokenizer = load_tokenizer
        self._remembered: dict[str, Condition] = {}  # on the host
        self._away_from: torch.device | None = None
        config = transformer.config
        self.width: int = config.num_attention_heads * config.attention_head_dim
        self.num_blocks: int = config.num_layers
        self.text_width: int = config.text_dim
        self.latent_channels: int = config.in_channels
        self.patch_size: tuple[int, int, int] = tuple(config.patch_size)
        self.spatial_factor: int = vae.config.scale_factor_spatial
        self.temporal_factor: int = vae.config.scale_factor_temporal
        self._fingerprints = {
            "transformer_fingerprint": fingerprint(transformer, most=SAMPLED),
            "vae_fingerprint": fingerprint(vae),
        }
        self.settings = settings_fingerprint(transformer.config, vae.config)
        self.schedule = (default_shift, timestep_scale)
        for block in transformer.blocks:
            block.attn2.set_processor(FoldedTextProcessor())

    @property
    def device(self) -> torch.device:
        """Where it computes, also while the transformer waits on the host."""
        return self._away_from or self.transformer.patch_embedding.weight.device

    # ------------------------------------------------------------------------------------------------- the network

    def velocity(
        self, latents: Float[Tensor, "b c t h w"], sigma: Float[Tensor, "*sigma"], condition: Condition
    ) -> Float[Tensor, "b c t h w"]:
        """The network's v = noise - x0 at normalised latents; sigma (batch,) or (), 1 = noise.  Dtype of ``latents``.

        Equals ``transformer(latents, sigma * 1000, text padded to 512 tokens)``.
        """
        with self._precision():
            inputs = self._embed(latents, sigma, condition)
            head = partial(self._patches, inputs.pop("time"))
            if self.step_cache is None:
                (patches,) = deque(self._run_blocks(self.num_blocks, inputs, head), maxlen=1)  # all are gigabytes
            else:
                patches = head(self.step_cache.run(self.transformer, condition, **inputs))
        grid = [size // patch for size, patch in zip(latents.shape[2:], self.patch_size, strict=True)]
        patches = patches.unflatten(2, (*self.patch_size, -1)).unflatten(1, grid)  # b, T, H, W, pt, ph, pw, c
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(latents.shape).to(latents.dtype)

    def features(
        self,
        latents: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "*sigma"],
        condition: Condition,
        blocks: Sequence[int],
    ) -> list[Float[Tensor, "b tokens width"]]:
        """Hidden states after each of ``blocks`` (0 = the first), in that order; later blocks are never run.

        Tokens are ordered time, height, width, in patches.  Raises PrflError for a block that does not exist.
        """
        if not blocks or not set(blocks) <= set(range(self.num_blocks)):
            raise PrflError(f"features after blocks {list(blocks)}", fix=f"choose among 0 to {self.num_blocks - 1}")
        with self._precision():
            states = self._run_blocks(max(blocks) + 1, self._embed(latents, sigma, condition))
            kept = {index: hidden for index, hidden in enumerate(states) if index in blocks}
        return [kept[index] for index in blocks]

    def _embed(self, latents: Tensor, sigma: Tensor, condition: Condition) -> dict[str, Any]:
        """What the blocks take: patches, text tokens (bias as last channel, if any), modulation, rotary tables."""
        network, batch = self.transformer, len(latents)
        assert len(condition) == batch, f"{batch} latents but {len(condition)} conditions"
        latents = latents.to(self.dtype)
        timestep = (sigma.to(latents.device) * self._timestep_scale).float().expand(batch)
        text = condition.prompt_embeds.to(latents)
        bias = None
        if self._computes_in_full_precision():
            text, bias = fold_padding(text, condition.lengths, TEXT_TOKENS)
        else:  # log(multiplicity) in the 8 bits of bfloat16 is 1.6 % off, so keep all the tokens
            text = pad_to(text, TEXT_TOKENS)
        time, modulation, text, _ = network.condition_embedder(timestep, text, None, timestep_seq_len=None)
        return {
            "hidden": network.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous(),
            "text": text if bias is None else torch.cat([text, bias[..., None].to(text)], dim=-1),
            "modulation": modulation.unflatten(1, (6, -1)),
            "rotary": network.rope(latents),
            "time": time,
        }

    def _patches(self, time: Tensor, hidden: Tensor) -> Tensor:
        """What stands behind the last block: its velocity, patch by patch."""
        shift, scale = (self.transformer.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        hidden = (self.transformer.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        return self.transformer.proj_out(hidden)

    def _precision(self) -> AbstractContextManager:
        """Autocast to ``dtype`` where the weights are kept in a wider one."""
        wider = self.transformer.patch_embedding.weight.dtype != self.dtype
        return torch.autocast(self.device.type, self.dtype) if wider else nullcontext()

    def _computes_in_full_precision(self) -> bool:
        kind = self.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else self.dtype
        return dtype in (torch.float32, torch.float64)

    @property
    def blocks_a_checkpoint(self) -> int:
        """Blocks of the whole network whose hidden states are kept once, between the first and the second of them.

        n / g kept states and the g s of the blocks that are computed again are fewest at g = sqrt(n / s), which is
        more than 1 only for blocks that save little themselves: s is 9 + hidden width / width with all kernels.
        """
        lean = self.kernels == frozenset(SWAPPED) and self.checkpointing == "full" and not self.offload
        config = self.transformer.config
        group = round(math.sqrt(config.num_layers / (9 + config.ffn_dim / self.width))) if lean else 1
        return group if group and config.num_layers % group == 0 else 1

    def _run_blocks(
        self, count: int, inputs: dict[str, Any], head: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Hidden states after each of the first ``count`` blocks; with ``head``, at the end what it makes of them (and
        not after every block).

        The head is checkpointed with the last block: by itself it would keep the hidden states in float32.
        """
        hidden = inputs["hidden"]
        others = inputs["text"], inputs["modulation"], inputs["rotary"]
        checkpointed = self.checkpointing != "none" and torch.is_grad_enabled()
        store = HostStore() if checkpointed and self.offload else None
        blocks, modes = list(self.transformer.blocks[:count]), self._modes(count, velocity=head is not None)
        for first, last in stretches(modes, self.blocks_a_checkpoint if head else 1):
            part = one_after_another(blocks[first:last], head if last == count else None)
            if checkpointed and modes[first] != "none":
                guarded = adapters.same_adapter_only(self.transformer, part)
                hidden = run_block(guarded, hidden, *others, mode=modes[first], store=store)
            else:
                hidden = part(hidden, *others)
            yield hidden
        if store is not None:
            store.settle()

    def _modes(self, count: int, velocity: bool) -> Sequence[Checkpointing]:
        """What each of the first ``count`` blocks keeps."""
        chosen = ((self.block_modes if velocity else self.feature_modes) or ())[:count]
        return [*chosen, *[self.checkpointing] * (count - len(chosen))]

    # ------------------------------------------------------------------------------------------------- the condition

    @cached_property
    def _text(self) -> tuple[Any, UMT5EncoderModel]:
        return self._load_text()

    @cached_property
    def tokenizer(self) -> Any:
        """Loaded at the first use, without the text encoder where the two can be loaded apart."""
        return self._load_tokenizer() if self._load_tokenizer else self._text[0]

    @property
    def text_encoder(self) -> UMT5EncoderModel:
        """Loaded at the first use: with cached conditions it never is (the real one has 5.7 billion weights)."""
        return self._text[1]

    def drop_text_encoder(self) -> None:
        """Free the text encoder's memory; the next ``condition`` loads it again."""
        self.__dict__.pop("_text", None)

    def remember(self, prompts: Iterable[str], progress: Callable[[list[str]], Iterable[str]] = iter) -> None:
        """Encode these prompts now, keep their conditions on the host, and free the text encoder: 10.6 GiB in Wan 2.1.

        One by one, since a batch's make-up would change the last bits.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._remembered]
        with self.transformer_on_host() if new else nullcontext():
            for prompt in progress(new) if new else ():
                self._remembered[prompt] = self.condition([prompt]).to("cpu")
            self.drop_text_encoder()

    def recall(self, conditions: Mapping[str, Condition]) -> None:
        """Conditions that were encoded before, by prompt: to be looked up as if they had been ``remember``ed."""
        self._remembered |= {prompt: condition.to("cpu") for prompt, condition in conditions.items()}

    @contextmanager
    def transformer_on_host(self) -> Iterator[None]:
        """Makes room for the text encoder, which at 1.3B is four times as large, or for the decoder of a long video."""
        networks, device = [self._base, *self.copies.values()], self.device
        self._away_from = device
        for network in networks:
            network.to("cpu")
        try:
            yield
        finally:
            for network in networks:
                network.to(device)
            self._away_from = None

    @torch.no_grad()
    def condition(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts as WanPipeline does (cleaned, at most 512 tokens); "" is the unconditional one.

        Prompts that are ``remember``ed are looked up.
        """
        assert not isinstance(prompts, str), "condition takes a list of prompts"
        if prompts and all(prompt in self._remembered for prompt in prompts):
            return Condition.cat([self._remembered[prompt] for prompt in prompts]).to(self.device)
        encoder = self.text_encoder
        tokens = self.tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="longest", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt",
        ).to(encoder.device)  # fmt: skip
        embeds = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        embeds = embeds.masked_fill(tokens.attention_mask[..., None] == 0, 0.0)
        return Condition(embeds.to(self.device, self.dtype), tokens.attention_mask.sum(1).to(self.device))

    # ------------------------------------------------------------------------------------------------- the VAE

    def encode(self, pixels: Float[Tensor, "b 3 f H W"]) -> Float[Tensor, "b c t h w"]:
        """Pixels in [-1, 1] to normalised latents (the posterior's mean), in the VAE's dtype."""
        self.latent_shape(*pixels.shape[2:])
        return vae_codec.encode(self.vae.to(self.device), pixels)

    def decode(self, latents: Float[Tensor, "b c t h w"], gradient_from: int = 0) -> Float[Tensor, "b 3 f H W"]:
        """Normalised latents to *unclamped* pixels, differentiable in the latents from frame ``gradient_from`` on, in
        the VAE's dtype; under ``checkpointing`` the decoder is checkpointed too."""
        return vae_codec.decode(self.vae.to(self.device), latents, gradient_from, self.checkpointing != "none")

    def park_vae(self) -> None:
        """The VAE waits on the host; the next ``encode`` or ``decode`` brings it back."""
        self.vae.to("cpu")

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(channels, t, h, w) of a video's latents; PrflError where the model cannot take the size."""
        patch_t, *patches = self.patch_size
        for name, size, patch in zip(("height", "width"), (height, width), patches, strict=True):
            unit = self.spatial_factor * patch
            if size < unit or size % unit:
                raise PrflError(f"a {name} of {size} is not a multiple of {unit}", fix=nearest(size, unit, unit))
        time = (frames - 1) // self.temporal_factor + 1
        if frames < 1 or (frames - 1) % self.temporal_factor or time % patch_t:
            fix = nearest(frames, self.temporal_factor * patch_t, self.temporal_factor * (patch_t - 1) + 1)
            raise PrflError(
                f"{frames} frames: the VAE takes 1 frame and then groups of {self.temporal_factor}", fix=fix
            )
        return self.latent_channels, time, height // self.spatial_factor, width // self.spatial_factor

    # ------------------------------------------------------------------------------------------------- identity

    def describe(self) -> dict[str, Any]:
        """JSON-able identity of the model: what a reward head or a cache made with it needs to find again.

        The fingerprints hash base weights rounded to bfloat16, so that the dtype it was loaded in does not matter.
        """
        return {
            "model_id": self.model_id,
            "revision": self.revision,
            "num_blocks": self.num_blocks,
            "width": self.width,
            "latent_channels": self.latent_channels,
            "patch_size": list(self.patch_size),
            "spatial_factor": self.spatial_factor,
            "temporal_factor": self.temporal_factor,
            "latents_mean": list(self.vae.config.latents_mean),
            "latents_std": list(self.vae.config.latents_std),
            "sigma_convention": SIGMA_CONVENTION,
            **self._fingerprints,
        }

    # ------------------------------------------------------------------------------------------------- adapters

    def add_adapter(
        self,
        name: str,
        *,
        rank: int,
        alpha: int | float,
        targets: list[str],
        dropout: float = 0.0,
        blocks: list[int] | None = None,
        seed: int = 0,
    ) -> None:
        """See ``adapters.add_lora``.  The adapter is trainable and not active."""
        adapters.add_lora(
            self._base, name, rank=rank, alpha=alpha, targets=targets, dropout=dropout, blocks=blocks, seed=seed
        )

    def train_all(self) -> None:
        """Every weight is trained in place: there is no base any more."""
        self.transformer.float().requires_grad_(True)

    def add_copy(self, name: str) -> None:
        """A trainable copy of the whole transformer, selected as an adapter is; the base stays frozen beside it."""
        self.copies[name] = deepcopy(self.transformer).float().requires_grad_(True)

    def use_kernels(self, which: Collection[str] = SWAPPED, attention: str = "sdpa") -> None:
        """Swap prfl_kernels' operations in, or with ``()`` out again, and an attention: see ``kernels.use_kernels``."""
        for network in (self._base, *self.copies.values()):
            use_kernels(network, which, attention)
        self.kernels = frozenset(which)

    def cheaper(self, how: Cheaper, exact: Set[int] = frozenset()) -> CheaperCalls:
        """The calls of one rollout, without gradient, that cost less but at the nodes ``exact``: see cheaper.py."""
        return CheaperCalls(self, how, exact)

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Select an adapter (None: the frozen base) for forward and backward: see ``adapters.use_adapter``.

        A copy becomes ``transformer`` inside.
        """
        before = self.transformer
        self.transformer = self.copies[name] if name in self.copies else self._base
        try:
            with adapters.use_adapter(self.transformer, None if name in self.copies else name):
                yield
        finally:
            self.transformer = before

    def dropping(self, name: str | None, seeds: Int[Tensor, " b"]) -> AbstractContextManager:
        """Drop inputs of this adapter, at its rate, by these seeds of the samples, on the device: see dropout.py."""
        layers = [] if name is None or name in self.copies else adapters.dropouts_of(self._base, name)
        return dropping(layers, seeds) if layers else nullcontext()

    @property
    def active_adapter(self) -> str | None:
        return adapters.active_adapter(self.transformer)

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        if name in self.copies:
            return dict(self.copies[name].named_parameters())
        return adapters.adapter_parameters(self._base, name)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """A copy of the adapter's weights, keyed ``blocks.0.attn1.to_q.lora_A.weight``."""
        return {key: value.detach().clone() for key, value in self.adapter_parameters(name).items()}

    def load_adapter_state(self, name: str, state: dict[str, Tensor]) -> None:
        adapters.load_state(self._base, name, state)


def nearest(size: int, unit: int, smallest: int) -> str:
    below = max(size - smallest, 0) // unit * unit + smallest
    return f"take {below} or {below + unit}"
