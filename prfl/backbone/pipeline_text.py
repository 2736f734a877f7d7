"""The tokenizer and the text encoder of a pipeline, each loaded at its first use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from prfl.backbone.condition import Ask, Condition


class PipelineText(ABC):
    """With conditions that are known the encoder is never loaded.

    load: gives tokenizer and encoder.  load_tokenizer: the tokenizer alone, where the two can be loaded apart.
    most: tokens that the encoder reads of a prompt.
    """

    most: int

    def __init__(
        self, load: Callable[[], tuple[Any, nn.Module]], load_tokenizer: Callable[[], Any] | None = None
    ) -> None:
        self.known: dict[Ask, Condition] = {}
        self._load, self._load_tokenizer = load, load_tokenizer

    @cached_property
    def _loaded(self) -> tuple[Any, nn.Module]:
        return self._load()

    @cached_property
    def tokenizer(self) -> Any:
        """Without the text encoder, where the two can be loaded apart."""
        return self._load_tokenizer() if self._load_tokenizer else self._loaded[0]

    def text_encoder(self) -> nn.Module:
        return self._loaded[1]

    def encoder(self) -> nn.Module:
        return self.text_encoder()

    def unknown(self) -> int | None:
        return self.tokenizer.unk_token_id

    def free(self) -> None:
        self.__dict__.pop("_loaded", None)

    def cleaned(self, prompt: str) -> str:
        """A prompt as the pipeline gives it to the tokenizer."""
        return prompt

    def tokens(self, prompts: Sequence[str], *, cut: bool = True) -> list[tuple[int, ...]]:
        options: dict[str, Any] = {"truncation": True, "max_length": self.most} if cut else {"verbose": False}
        ids = self.tokenizer([self.cleaned(prompt) for prompt in prompts], **options).input_ids
        return [tuple(tokens) for tokens in ids]

    @abstractmethod
    def encode(self, asks: Sequence[Ask], device: torch.device, dtype: torch.dtype) -> Condition:
        """As the pipeline does.  The conditions are on the device, in the dtype."""
