"""What a backbone makes of prompts (opaque to everyone else), and how padded text is attended to in few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """A batch of text conditions.

    prompt_embeds: (batch, tokens, dim), zero beyond each sample's length.  lengths: (batch,), real tokens per sample.
    """

    prompt_embeds: Float[Tensor, "b tokens dim"]
    lengths: Int[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: slice | Tensor | list[int]) -> Condition:
        """Select, reorder or repeat samples."""
        return Condition(self.prompt_embeds[index], self.lengths[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        return Condition(self.prompt_embeds.to(device=device, dtype=dtype), self.lengths.to(device=device))

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Join batches, padding the token axis to the longest."""
        tokens = max(condition.prompt_embeds.shape[1] for condition in conditions)
        padded = [F.pad(c.prompt_embeds, (0, 0, 0, tokens - c.prompt_embeds.shape[1])) for c in conditions]
        return Condition(torch.cat(padded), torch.cat([condition.lengths for condition in conditions]))

    def tensors(self) -> dict[str, Tensor]:
        """Plain tensors, for a cache file; ``from_tensors`` is the inverse."""
        return {"prompt_embeds": self.prompt_embeds, "lengths": self.lengths}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Condition:
        return Condition(tensors["prompt_embeds"], tensors["lengths"])


def fold_padding(prompt_embeds: Tensor, lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Text padded with zeros to ``total`` tokens, in fewer: tokens and the attention bias that makes them equal.

    All zero tokens have one key k0 and one value v0, so in softmax attention m of them weigh as one token whose
    logit is q.k0 + log m, exactly.  A sample of n real tokens keeps T - n zero slots, each with a bias of
    log((total - n) / (T - n)), where T = min(longest + 1, total).

    prompt_embeds (b, tokens, dim), lengths (b,) -> (b, T, dim), bias (b, T).
    """
    kept = min(int(lengths.max()) + 1, total)
    prompt_embeds = F.pad(prompt_embeds, (0, 0, 0, max(0, kept - prompt_embeds.shape[1])))[:, :kept]
    lengths = lengths.to(prompt_embeds.device)[:, None]
    is_padding = torch.arange(kept, device=prompt_embeds.device) >= lengths
    multiplicity = (total - lengths).double() / (kept - lengths).clamp(min=1)
    return prompt_embeds, torch.where(is_padding, multiplicity, 1.0).log().to(prompt_embeds.dtype)


def pad_to(prompt_embeds: Tensor, total: int) -> Tensor:
    """Zero tokens up to ``total``, as WanPipeline has them."""
    return F.pad(prompt_embeds, (0, 0, 0, total - prompt_embeds.shape[1]))


class FoldedTextProcessor(WanAttnProcessor):
    """Cross-attention that takes its attention bias as one more channel of the text tokens.

    Carrying the bias with the tokens keeps the processor without state, so a checkpointed block can be computed again
    at any time.  Tokens without the extra channel (a WanPipeline on the same network) are attended to as always.
    """

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is not None
        encoder_hidden_states, bias = split_bias(encoder_hidden_states, hidden_states.shape[-1])
        attention_mask = attention_mask if bias is None else bias
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def split_bias(text: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Text tokens, and the attention bias (b, 1, 1, tokens) that they may carry as one channel more than ``width``."""
    if text.shape[-1] != width + 1:
        return text, None
    # A mask that requires a gradient (when all weights are trained) would turn fused attention off.
    return text[..., :width], text[:, None, None, :, width].detach()
