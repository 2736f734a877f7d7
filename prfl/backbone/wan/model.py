"""The diffusers Wan family, text to video: velocity, and features with early exit.

The block loop is our own over the diffusers modules: features leave after the last block that is wanted, blocks can be
checkpointed with a guard on the adapter, and the padded text is folded (see ``text.fold_padding``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone import adapters
from prfl.backbone.base import Facts
from prfl.backbone.cheaper import Cheaper
from prfl.backbone.checkpointing import one_after_another, run_block, stretches
from prfl.backbone.condition import EMBEDS, LENGTHS, Condition
from prfl.backbone.network import all_predictors
from prfl.backbone.wan.cheaper import CheaperCalls, StepCache
from prfl.backbone.wan.codec import WanCodec
from prfl.backbone.wan.kernels import SWAPPED, use_kernels
from prfl.backbone.wan.text import TEXT_TOKENS, FoldedTextProcessor, WanText, fold_padding, pad_to
from prfl.utils.errors import PrflError
from prfl.utils.host_store import HostStore


class WanBackbone(WanCodec):
    """A Wan text-to-video model.  Made by ``load_backbone``; every base weight is frozen."""

    def __init__(
        self, networks: Mapping[str, WanTransformer3DModel], vae: AutoencoderKLWan, text: WanText, facts: Facts
    ) -> None:
        super().__init__(networks, vae, text, facts)
        self.step_cache: StepCache | None = None
        for network in networks.values():
            for block in network.blocks:
                block.attn2.set_processor(FoldedTextProcessor())

    @property
    def transformer(self) -> WanTransformer3DModel:
        """The one that computes now: a copy, inside its adapter."""
        return self.network

    # ------------------------------------------------------------------------------------------------- the network

    def velocity(
        self, latents: Float[Tensor, "b c t h w"], sigma: Float[Tensor, "*sigma"], condition: Condition
    ) -> Float[Tensor, "b c t h w"]:
        """The network's v = noise - x0 at normalised latents; sigma (batch,) or (), 1 = noise.  Dtype of ``latents``.

        Equals ``transformer(latents, sigma * 1000, text padded to 512 tokens)``.
        """
        with self.precision(self.transformer.patch_embedding.weight):
            inputs, count = self._embed(latents, sigma, condition), len(self.transformer.blocks)
            head = partial(_patches, self.transformer, inputs.pop("time"))
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
        with self.precision(self.transformer.patch_embedding.weight):
            states = self._run_blocks(max(blocks) + 1, self._embed(latents, sigma, condition))
            kept = {index: hidden for index, hidden in enumerate(states) if index in blocks}
        return [kept[index] for index in blocks]

    def _embed(self, latents: Tensor, sigma: Tensor, condition: Condition) -> dict[str, Any]:
        """What the blocks take: patches, text tokens (bias as last channel, if any), modulation, rotary tables."""
        network, batch = self.transformer, len(latents)
        assert len(condition) == batch, f"{batch} latents but {len(condition)} conditions"
        latents = latents.to(self.facts.dtype)
        timestep = self.timesteps(sigma, latents)
        text = condition.tensors[EMBEDS].to(latents)
        bias = None
        if self._computes_in_full_precision():
            text, bias = fold_padding(text, condition.tensors[LENGTHS], TEXT_TOKENS)
        else:  # log(multiplicity) in the 8 bits of bfloat16 is 1.6 % off, so keep all the tokens
            text = pad_to(text, TEXT_TOKENS)
        each = timestep.shape[1] if timestep.ndim == 2 else None
        time, modulation, text, _ = network.condition_embedder(timestep.flatten(), text, None, timestep_seq_len=each)
        return {
            "hidden": network.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous(),
            "text": text if bias is None else torch.cat([text, bias[..., None].to(text)], dim=-1),
            "modulation": modulation.unflatten(-1, (6, -1)),
            "rotary": network.rope(latents),
            "time": time,
        }

    def timesteps(self, sigma: Tensor, latents: Tensor) -> Tensor:
        """The network's time of each sample (b,), or of each token (b, tokens), in float32."""
        return (sigma.to(latents.device) * self.facts.schedule[1]).float().expand(len(latents))

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
                guarded = adapters.same_adapter_only(nn.ModuleList(blocks[first:last]), part)
                hidden = run_block(guarded, hidden, *others, mode=modes[first], store=store)
            else:
                hidden = part(hidden, *others)
            yield hidden
        if store is not None:
            store.settle()

    # ------------------------------------------------------------------------------------------------- cheaper calls

    def use_kernels(self, which: Collection[str] = SWAPPED, attention: str = "sdpa") -> None:
        """Swap prfl_kernels' operations in, or with ``()`` out again, and an attention: see ``kernels.use_kernels``."""
        for network in all_predictors(self):
            use_kernels(network, which, attention)
        self.running.kernels = frozenset(which)

    def cheaper(self, how: Cheaper, exact: Set[int] = frozenset()) -> CheaperCalls:
        """The calls of one rollout, without gradient, that cost less but at the nodes ``exact``: see cheaper.py."""
        return CheaperCalls(self, how, exact)


def _patches(network: WanTransformer3DModel, time: Tensor, hidden: Tensor) -> Tensor:
    """What stands behind the last block: its velocity, patch by patch.

    Of a network that is named: a checkpoint runs it again, when another may be the one that computes.
    """
    shift, scale = (network.scale_shift_table + time.unsqueeze(-2)).chunk(2, dim=-2)
    if time.ndim == 3:  # of each token
        shift, scale = shift.squeeze(-2), scale.squeeze(-2)
    hidden = (network.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    return network.proj_out(hidden)
