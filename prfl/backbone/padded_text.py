"""Text that is padded to one length and read without a mask: its padding is read too, by encoder and network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from prfl.backbone.condition import EMBEDS, LENGTHS, Ask, Condition, TensorSpec
from prfl.backbone.pipeline_text import PipelineText


def condition_specs(tokens: int, width: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The embeddings, always of so many tokens, and the number of those that are no padding."""
    return {
        EMBEDS: TensorSpec((tokens, width), dtype),
        LENGTHS: TensorSpec((), torch.int64, counts=EMBEDS),
    }


class PaddedText(PipelineText):
    """One encoder, whose last hidden states are the condition: T5 of CogVideoX, CLIP of ModelScope's UNet."""

    def __init__(
        self,
        load: Callable[[], tuple[Any, nn.Module]],
        load_tokenizer: Callable[[], Any] | None,
        most: int,
    ) -> None:
        super().__init__(load, load_tokenizer)
        self.most = most

    @torch.no_grad()
    def encode(self, asks: Sequence[Ask], device: torch.device, dtype: torch.dtype) -> Condition:
        encoder = self.text_encoder()
        tokens = self.tokenizer(
            [ask.prompt for ask in asks],
            padding="max_length", max_length=self.most, truncation=True, return_tensors="pt",
        )  # fmt: skip
        embeds = encoder(tokens.input_ids.to(next(encoder.parameters()).device))[0]
        lengths = tokens.attention_mask.sum(1)
        return Condition({EMBEDS: embeds.to(device, dtype), LENGTHS: lengths.to(device)}, tuple(asks))
