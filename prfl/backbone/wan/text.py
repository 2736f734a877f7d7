"""Wan's text: the UMT5 encoder, and how padding that the network sees without a mask is attended to in few tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from prfl.backbone.condition import EMBEDS, LENGTHS, Ask, Condition, TensorSpec
from prfl.backbone.pipeline_text import PipelineText

TEXT_TOKENS = 512  # WanPipeline pads every prompt to this many tokens, without a mask
RAGGED = frozenset({EMBEDS})


def condition_specs(text_width: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The embeddings of the real tokens, and their number."""
    return {
        EMBEDS: TensorSpec((None, text_width), dtype),
        LENGTHS: TensorSpec((), torch.int64, counts=EMBEDS),
    }


def text_condition(prompt_embeds: Tensor, lengths: Tensor, asks: Sequence[Ask] | None = None) -> Condition:
    """prompt_embeds: (batch, tokens, width), zero beyond each sample's length.  lengths: (batch,), real tokens."""
    asks = (Ask(""),) * len(lengths) if asks is None else tuple(asks)
    return Condition({EMBEDS: prompt_embeds, LENGTHS: lengths}, asks, RAGGED)


def padded_condition(prompt_embeds: Tensor) -> Condition:
    """The condition of embeddings as WanPipeline holds them: (batch, tokens, width), padded with zeros."""
    return text_condition(prompt_embeds, prompt_embeds.abs().amax(2).ne(0).sum(1))


class WanText(PipelineText):
    """UMT5; the real one has 5.7 billion weights."""

    most = TEXT_TOKENS

    def cleaned(self, prompt: str) -> str:
        return prompt_clean(prompt)

    @torch.no_grad()
    def encode(self, asks: Sequence[Ask], device: torch.device, dtype: torch.dtype) -> Condition:
        """As WanPipeline does: prompts cleaned, at most 512 tokens."""
        encoder = self.text_encoder()
        tokens = self.tokenizer(
            [self.cleaned(ask.prompt) for ask in asks],
            padding="longest", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt",
        ).to(encoder.device)  # fmt: skip
        embeds = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        embeds = embeds.masked_fill(tokens.attention_mask[..., None] == 0, 0.0)
        return text_condition(embeds.to(device, dtype), tokens.attention_mask.sum(1).to(device), asks)


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
