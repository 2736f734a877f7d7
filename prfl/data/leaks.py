"""Checks that nothing is in two splits, or on both sides of a pair: by text, by tokens and by content.

A held-out prompt that was trained on under another spelling, or a video under another name, makes held-out figures
lie.  What is the same is refused; what only looks the same, or only to this model, is counted and warned of.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

from prfl.backbone import Backbone
from prfl.data.manifest import LabelledVideo, PreferencePair
from prfl.data.prompts import plain
from prfl.utils.console import warn
from prfl.utils.errors import PrflError

Tokens = dict[str, tuple[int, ...]]
"""The tokens that the text encoder gets of each prompt: at most ``Facts.text_tokens``."""


def check_prompts(splits: Mapping[str, Sequence[str]], where: str, backbone: Backbone) -> None:
    """Do ``check_apart``; warn of prompts of one split that the text encoder cannot tell apart, and of their tokens."""
    tokens = check_apart(splits, where, backbone)
    if tokens:
        for split, prompts in splits.items():
            warn_of_repeats(split, prompts, where, backbone, tokens)
        for text in token_warnings(list(tokens), where, backbone, tokens):
            warn(text)


def check_apart(splits: Mapping[str, Sequence[str]], where: str, backbone: Backbone) -> Tokens:
    """Return the tokens of all prompts; {} where there is no tokenizer, with a warning.

    Raises PrflError for prompts of two splits that are one to the text encoder; warns of them where that is for want of
    words that it knows, and of those that differ only in how they are written.
    """
    prompts = list(dict.fromkeys(prompt for split in splits.values() for prompt in split))
    try:
        tokens = token_ids(backbone, prompts)
    except PrflError as error:  # with a filled cache nobody else needs it
        warn(f"{where}: the prompts are compared as texts only: {error.what}")
        tokens = {}

    # Token for token the same: refused, unless only the tokenizer cannot tell the words.
    same = shared(splits, lambda prompt: tokens[prompt]) if tokens else []
    unknown = set(strange(backbone, tokens))
    exact = [pair for pair in same if pair[0] not in unknown or plain(pair[0]) == plain(pair[2])]
    if exact:
        what = f"{len(exact)} prompts are, token for token, in another split too: {_examples(exact)}"
        what += f" ({one_to_model(backbone)})"
        raise PrflError(what, where=where, fix="give each prompt to one split, or write the difference in other words")
    if same:  # other texts, but a tokenizer of few words cannot tell
        warn(
            f"{where}: {len(same)} prompts are, token for token, in another split too: {_examples(same)} "
            f"({one_to_model(backbone)}); what is trained on is held out too"
        )

    if alike := shared(splits, plain):
        warn(
            f"{where}: {len(alike)} prompts differ from one of another split only in case, spaces, Unicode form or a "
            f"full stop: {_examples(alike)}; what is trained on is held out too"
        )
    return tokens


def token_ids(backbone: Backbone, prompts: Sequence[str]) -> Tokens:
    """Tokenize prompts as the text encoder does.  Raises PrflError where the tokenizer cannot be loaded."""
    if not prompts:
        return {}
    return dict(zip(prompts, backbone.text.tokens(prompts), strict=True))


def one_to_model(backbone: Backbone) -> str:
    """Say why a model may not tell texts apart."""
    return f"unknown words are all one token to it, and only the first {backbone.facts.text_tokens} tokens count"


def strange(backbone: Backbone, tokens: Tokens) -> list[str]:
    """List the prompts with words that the tokenizer does not know."""
    unknown = backbone.text.unknown() if tokens else None
    return [] if unknown is None else [prompt for prompt, ids in tokens.items() if unknown in ids]


def warn_of_repeats(split: str, prompts: Sequence[str], where: str, backbone: Backbone, tokens: Tokens) -> None:
    """Warn of the prompts of one split that are one to the text encoder."""
    first: dict[tuple[int, ...], str] = {}
    repeated = []
    texts = dict.fromkeys(prompts)
    for prompt in texts:
        earlier = first.setdefault(tokens[prompt], prompt)
        if earlier != prompt:
            repeated.append((prompt, earlier))
    if repeated:
        warn(
            f"{where}: {len(repeated)} of {len(texts)} prompts of {split} are, token for token, another one of it: "
            f"{' is '.join(map(_short, repeated[0]))} ({one_to_model(backbone)})"
        )


def token_warnings(prompts: Sequence[str], where: str, backbone: Backbone, tokens: Tokens) -> list[str]:
    """Write warnings of prompts that are cut, and of those with words that the tokenizer does not know."""
    unknown = strange(backbone, tokens)
    most = backbone.facts.text_tokens
    full = [prompt for prompt in prompts if len(tokens[prompt]) == most]
    whole = backbone.text.tokens(full, cut=False) if full else []
    lengths = {prompt: len(ids) for prompt, ids in zip(full, whole, strict=True) if len(ids) > most}

    texts = []
    if unknown:
        texts.append(
            f"{where}: {len(unknown)} of {len(prompts)} prompts have words that the tokenizer does not know, all of "
            f"which become one token: {_short(unknown[0])}"
        )
    if lengths:
        longest = max(lengths, key=lambda prompt: lengths[prompt])
        texts.append(
            f"{where}: {len(lengths)} of {len(prompts)} prompts are cut behind {most} tokens, which is all that "
            f"the model reads; the longest has {lengths[longest]}: {_short(longest)}"
        )
    return texts


def shared(splits: Mapping[str, Sequence[str]], key: Callable[[str], Hashable]) -> list[tuple[str, str, str, str]]:
    """List (prompt, its split, prompt, its split) for every prompt whose key one of an earlier split has."""
    owner: dict[Hashable, tuple[str, str]] = {}
    pairs = []
    for split, prompts in splits.items():
        for prompt in dict.fromkeys(prompts):
            other, owning = owner.setdefault(key(prompt), (prompt, split))
            if owning != split:
                pairs.append((prompt, split, other, owning))
    return pairs


def check_contents(
    rows: Sequence[LabelledVideo | PreferencePair], content: Mapping[Path, Path | str], where: str
) -> None:
    """Raise PrflError for a video in two splits or on both sides of a pair, under whatever names.

    content: by video, something that is equal where their bytes are; videos without it are left out.
    """
    sides = [row for row in rows if isinstance(row, PreferencePair) and row.a in content]
    same = [row for row in sides if content[row.a] == content.get(row.b)]
    if same:
        what = f"{len(same)} pairs have the same video on both sides: {same[0].a.name} and {same[0].b.name}"
        raise PrflError(f"{what} of {_short(same[0].prompt)}", where=where, fix="leave these pairs out")

    owner: dict[Path | str, tuple[str | None, Path]] = {}
    crossing: dict[Path, str] = {}
    for row in rows:
        for video in [row.video] if isinstance(row, LabelledVideo) else [row.a, row.b]:
            if video in content:
                split, first = owner.setdefault(content[video], (row.split, video))
                if split != row.split:
                    crossing[video] = f"{video.name} ({row.split}) is {first.name} ({split})"

    if crossing:
        what = f"{len(crossing)} videos are in two splits: {'; '.join(list(crossing.values())[:3])}"
        raise PrflError(what, where=where, fix="give all rows of a video one split, or leave some out")


def _examples(same: Sequence[tuple[str, str, str, str]]) -> str:
    shown = [f"{_short(prompt)} ({split}) and {_short(other)} ({owner})" for prompt, split, other, owner in same[:2]]
    return "; ".join(shown)


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else f"{prompt[:57]}...")
