"""Prompts as a public reward's network reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from prfl.reward.public import load_error
from prfl.utils.console import warn

Tokenise = Callable[[list[str]], dict[str, Tensor]]
CLIP_TOKENS = 77  # of a CLIP's text side


def load_tokenizer(name: str, revision: str | None, example: str) -> Any:
    """Load a tokenizer from a folder or hub id.  example: a hub id of one, for the error.  Raises PrflError."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizers has no class of its own for a damaged file
        fix = f"give a folder or hub id that has tokenizer.json too, as {example}"
        raise load_error(name, error, "tokenizer", f"tokenizer, as {example}", fix) from error


def read_tokeniser(name: str, revision: str | None, example: str, tokens: int = CLIP_TOKENS) -> Tokenise:
    """Load a tokenizer; it fills up to so many tokens, and a prompt that is cut is warned of.  Raises PrflError."""
    tokenizer = load_tokenizer(name, revision, example)

    def tokenise(prompts: Sequence[str]) -> dict[str, Tensor]:
        lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
        if cut := sum(length > tokens for length in lengths):
            warn(f"the reward reads {tokens} tokens of a prompt: the end of {cut} of {len(lengths)} is not read")
        read = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
        return {name: read[name] for name in ("input_ids", "attention_mask")}

    return tokenise
