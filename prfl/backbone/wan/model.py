"""The diffusers Wan family, text to video: velocity, features with early exit, text condition, VAE and adapters.

The block loop is our own over the diffusers modules: features leave after the last block that is wanted, blocks can be
checkpointed with a guard on the adapter, and the padded text is folded (see ``text.fold_padding``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from prfl.backbone import adapters
from prfl.backbone.base import Facts, LoraSpec
from prfl.backbone.cheaper import Cheaper
from prfl.backbone.checkpointing import Running, one_after_another, run_block, stretches
from prfl.backbone.condition import Ask, Condition, as_asks
from prfl.backbone.dropout import dropping
from prfl.backbone.frames import detach_others, pixel_frames
from prfl.backbone.network import computing, copies
from prfl.backbone.wan import vae as vae_codec
from prfl.backbone.wan.cheaper import CheaperCalls, StepCache
from prfl.backbone.wan.kernels import SWAPPED, use_kernels
from prfl.backbone.wan.text import EMBEDS, LENGTHS, TEXT_TOKENS, FoldedTextProcessor, WanText, fold_padding, pad_to
from prfl.utils.errors import PrflError
from prfl.utils.host_store import HostStore
from prfl.utils.schedule import chain_sigmas

TRANSFORMER, VAE = "transformer", "vae"


class WanBackbone:
    """A Wan text-to-video model.  Made by ``load_backbone``; every base weight is frozen.

    Outside ``with backbone.adapter(name)`` the frozen base is active.  ``running.checkpointing`` other than ``none``
    computes each block again in the backward pass instead of keeping its activations (see checkpointing.py); with
    ``running.offload`` what it does keep waits in host memory.

    All weights can be trained, in place (``network.train_all``) or in a copy beside the frozen base
    (``network.add_copy``).  They are float32 then, because a small step vanishes in a half precision, and compute in
    ``facts.dtype`` by autocast.
    """

    def __init__(self, transformer: WanTransformer3DModel, vae: AutoencoderKLWan, text: WanText, facts: Facts) -> None:
        self.facts, self.text, self.running = facts, text, Running()
        self.transformer = transformer.requires_grad_(False).eval()  # that computes now: a copy, inside its adapter
        self.networks: dict[str, nn.Module] = {TRANSFORMER: transformer, VAE: vae.requires_grad_(False).eval()}
        self.step_cache: StepCache | None = None
        for block in transformer.blocks:
            block.attn2.set_processor(FoldedTextProcessor())

    @property
    def vae(self) -> AutoencoderKLWan:
        return self.networks[VAE]

    # ------------------------------------------------------------------------------------------------- the network

    def velocity(
        self, latents: Float[Tensor, "b c t h w"], sigma: Float[Tensor, "*sigma"], condition: Condition
    ) -> Float[Tensor, "b c t h w"]:
        """The network's v = noise - x0 at normalised latents; sigma (batch,) or (), 1 = noise.  Dtype of ``latents``.

        Equals ``transformer(latents, sigma * 1000, text padded to 512 tokens)``.
        """
        with self._precision():
            inputs, count = self._embed(latents, sigma, condition), len(self.transformer.blocks)
            head = partial(self._patches, inputs.pop("time"))
            if self.step_cache is None:
                (patches,) = deque(self._run_blocks(count, inputs, head), maxlen=1)  # all are gigabytes
            else:
                patches = head(self.step_cache.run(self.transformer, condition, **inputs))
        grid = [size // patch for size, patch in zip(latents.shape[2:], self.facts.patch, strict=True)]
        patches = patches.unflatten(2, (*self.facts.patch, -1)).unflatten(1, grid)  # b, T, H, W, pt, ph, pw, c
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
        count = len(self.transformer.blocks)
        if not blocks or not set(blocks) <= set(range(count)):
            raise PrflError(f"features after blocks {list(blocks)}", fix=f"choose among 0 to {count - 1}")
        with self._precision():
            states = self._run_blocks(max(blocks) + 1, self._embed(latents, sigma, condition))
            kept = {index: hidden for index, hidden in enumerate(states) if index in blocks}
        return [kept[index] for index in blocks]

    def _embed(self, latents: Tensor, sigma: Tensor, condition: Condition) -> dict[str, Any]:
        """What the blocks take: patches, text tokens (bias as last channel, if any), modulation, rotary tables."""
        network, batch = self.transformer, len(latents)
        assert len(condition) == batch, f"{batch} latents but {len(condition)} conditions"
        latents = latents.to(self.facts.dtype)
        timestep = (sigma.to(latents.device) * self.facts.schedule[1]).float().expand(batch)
        text = condition.tensors[EMBEDS].to(latents)
        bias = None
        if self._computes_in_full_precision():
            text, bias = fold_padding(text, condition.tensors[LENGTHS], TEXT_TOKENS)
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
        wider = self.transformer.patch_embedding.weight.dtype != self.facts.dtype
        return torch.autocast(self.facts.device.type, self.facts.dtype) if wider else nullcontext()

    def _computes_in_full_precision(self) -> bool:
        kind = self.facts.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else self.facts.dtype
        return dtype in (torch.float32, torch.float64)

    @property
    def blocks_a_checkpoint(self) -> int:
        """Blocks of the whole network whose hidden states are kept once, between the first and the second of them."""
        return self.running.blocks_together(self.facts.kernels, self.facts.lean_group)

    def _run_blocks(
        self, count: int, inputs: dict[str, Any], head: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Hidden states after each of the first ``count`` blocks; with ``head``, at the end what it makes of them (and
        not after every block).

        The head is checkpointed with the last block: by itself it would keep the hidden states in float32.
        """
        hidden = inputs["hidden"]
        others = inputs["text"], inputs["modulation"], inputs["rotary"]
        checkpointed = self.running.checkpointing != "none" and torch.is_grad_enabled()
        store = HostStore() if checkpointed and self.running.offload else None
        blocks, modes = list(self.transformer.blocks[:count]), self.running.modes(count, velocity=head is not None)
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

    # ------------------------------------------------------------------------------------------------- the condition

    def condition(self, asks: Sequence[Ask | str]) -> Condition:
        """Encode prompts as WanPipeline does, or look them up where all of them are known; "" is the unconditional one.

        Raises PrflError for an ask with an image.
        """
        samples = as_asks(asks)
        if any(ask.image is not None for ask in samples):
            raise PrflError("a text-to-video model takes no first frame", fix="give prompts alone")
        if samples and all(ask in self.text.known for ask in samples):
            return Condition.cat([self.text.known[ask] for ask in samples]).to(self.facts.device)
        return self.text.encode(samples, self.facts.device, self.facts.dtype)

    # ------------------------------------------------------------------------------------------------- the chain

    def sigmas(self, steps: int, shape: Sequence[int], shift: float | None = None) -> Float[Tensor, " n"]:
        return chain_sigmas(steps, self.facts.shift if shift is None else shift)

    def start(self, noise: Float[Tensor, "b c t h w"], condition: Condition) -> Float[Tensor, "b c t h w"]:
        return noise

    # ------------------------------------------------------------------------------------------------- the VAE

    def encode(self, pixels: Float[Tensor, "b 3 f H W"]) -> Float[Tensor, "b c t h w"]:
        """Pixels in [-1, 1] to normalised latents (the posterior's mean), in the VAE's dtype."""
        self.latent_shape(*pixels.shape[2:])
        return vae_codec.encode(self.vae.to(self.facts.device), pixels)

    def decode(
        self, latents: Float[Tensor, "b c t h w"], shown: Sequence[int] | None = None
    ) -> Float[Tensor, "b 3 f H W"]:
        """Normalised latents to *unclamped* pixels, in the VAE's dtype; under checkpointing the decoder is checkpointed
        too.

        shown: latent frames behind the last of them are not decoded; those before are, because the decoder is causal.
        """
        vae, checkpointed = self.vae.to(self.facts.device), self.running.checkpointing != "none"
        if shown is None:
            return vae_codec.decode(vae, latents, 0, checkpointed)
        passing = detach_others(latents, shown)[:, :, : shown[-1] + 1]
        pixels = vae_codec.decode(vae, passing, shown[0], checkpointed)
        return pixels[:, :, pixel_frames(shown, self.facts.temporal_factor)]

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(channels, t, h, w) of a video's latents; PrflError where the model cannot take the size."""
        patch_t, *patches = self.facts.patch
        spatial, temporal = self.vae.config.scale_factor_spatial, self.facts.temporal_factor
        for name, size, patch in zip(("height", "width"), (height, width), patches, strict=True):
            unit = spatial * patch
            if size < unit or size % unit:
                raise PrflError(f"a {name} of {size} is not a multiple of {unit}", fix=nearest(size, unit, unit))
        time = (frames - 1) // temporal + 1
        if frames < 1 or (frames - 1) % temporal or time % patch_t:
            fix = nearest(frames, temporal * patch_t, temporal * (patch_t - 1) + 1)
            raise PrflError(f"{frames} frames: the VAE takes 1 frame and then groups of {temporal}", fix=fix)
        return self.facts.latent_channels, time, height // spatial, width // spatial

    # ------------------------------------------------------------------------------------------------- adapters

    def add_adapter(self, name: str, spec: LoraSpec) -> None:
        """See ``adapters.add_lora``.  The adapter is trainable and not active."""
        adapters.add_lora(self.networks[TRANSFORMER], name, spec, self.facts.blocks[TRANSFORMER])

    def use_kernels(self, which: Collection[str] = SWAPPED, attention: str = "sdpa") -> None:
        """Swap prfl_kernels' operations in, or with ``()`` out again, and an attention: see ``kernels.use_kernels``."""
        for network in (self.networks[TRANSFORMER], *copies(self).values()):
            use_kernels(network, which, attention)
        self.running.kernels = frozenset(which)

    def cheaper(self, how: Cheaper, exact: Set[int] = frozenset()) -> CheaperCalls:
        """The calls of one rollout, without gradient, that cost less but at the nodes ``exact``: see cheaper.py."""
        return CheaperCalls(self, how, exact)

    @contextmanager
    def adapter(self, name: str | None, dropout: Int[Tensor, " b"] | None = None) -> Iterator[None]:
        """Select an adapter (None: the frozen base) for forward and backward: see ``adapters.use_adapter``.

        A copy becomes ``transformer`` inside.  dropout: see dropout.py.
        """
        before = self.transformer
        self.transformer = computing(self, name)[TRANSFORMER]
        lora = name if self.transformer is self.networks[TRANSFORMER] else None
        layers = adapters.dropouts_of(self.transformer, lora) if lora and dropout is not None else []
        try:
            masks = dropping(layers, dropout) if layers and dropout is not None else nullcontext()
            with adapters.use_adapter(self.transformer, lora), masks:
                yield
        finally:
            self.transformer = before

    @property
    def active_adapter(self) -> str | None:
        return adapters.active_adapter(self.transformer)

    def parameters(self, name: str | None) -> dict[str, nn.Parameter]:
        """An adapter's, or a copy's; None: the weights of the base that are trained in place."""
        network = computing(self, name)[TRANSFORMER]
        if name is not None and network is self.networks[TRANSFORMER]:
            return adapters.adapter_parameters(network, name)
        return {key: parameter for key, parameter in network.named_parameters() if parameter.requires_grad}


def nearest(size: int, unit: int, smallest: int) -> str:
    below = max(size - smallest, 0) // unit * unit + smallest
    return f"take {below} or {below + unit}"
