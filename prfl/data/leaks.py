"""Checks that nothing is in two splits, or on both sides of a pair: by text, by tokens and by content.

If a held-out prompt was also trained on in another spelling, or a held-out video under another name, the held-out
figures are wrong.  Equal prompts and videos are an error.  Prompts that are equal only for this tokenizer, or that
differ only in how they are written, are counted in a warning.
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
"""For each prompt, the tokens that the text encoder receives: at most ``Facts.text_tokens``."""


def check_prompts(splits: Mapping[str, Sequence[str]], where: str, backbone: Backbone) -> None:
    """Check prompts across splits (``check_apart``), and within each split.

    Warns of prompts of one split that have the same tokens, of prompts that are cut, and of unknown words.
    """
    tokens = check_apart(splits, where, backbone)
    if tokens:
        for split, prompts in splits.items():
            warn_of_repeats(split, prompts, where, backbone, tokens)
        for text in token_warnings(list(tokens), where, backbone, tokens):
            warn(text)


def check_apart(splits: Mapping[str, Sequence[str]], where: str, backbone: Backbone) -> Tokens:
    """Check that no prompt is in two splits.  Returns the tokens of all prompts; {} and a warning without a tokenizer.

    Raises PrflError for prompts of two splits that have the same tokens.  If their tokens are the same only because of
    words that the tokenizer does not know, that is a warning; so are prompts that differ only in how they are written.
    """
    prompts = list(dict.fromkeys(prompt for split in splits.values() for prompt in split))
    try:
        tokens = token_ids(backbone, prompts)
    except PrflError as error:  # with a filled cache nothing else needs the tokenizer
        warn(f"{where}: the prompts are compared as texts only: {error.what}")
        tokens = {}

    # The same tokens are an error, unless they come from words that the tokenizer does not know.
    same = shared(splits, lambda prompt: tokens[prompt]) if tokens else []
    unknown = set(strange(backbone, tokens))
    exact = [pair for pair in same if pair[0] not in unknown or plain(pair[0]) == plain(pair[2])]
    if exact:
        what = f"{len(exact)} prompts are, token for token, in another split too: {_examples(exact)}"
        what += f" ({one_to_model(backbone)})"
        raise PrflError(what, where=where, fix="give each prompt to one split, or write the difference in other words")
    if same:  # different texts with unknown words
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
    """Say why different texts may have the same tokens."""
    return f"unknown words are all one token to it, and only the first {backbone.facts.text_tokens} tokens count"


def strange(backbone: Backbone, tokens: Tokens) -> list[str]:
    """List the prompts with words that the tokenizer does not know."""
    unknown = backbone.text.unknown() if tokens else None
    return [] if unknown is None else [prompt for prompt, ids in tokens.items() if unknown in ids]


def warn_of_repeats(split: str, prompts: Sequence[str], where: str, backbone: Backbone, tokens: Tokens) -> None:
    """Warn of the prompts of one split that have the same tokens."""
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
    """Write the warnings about prompts that are cut, and about prompts with words that the tokenizer does not know."""
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
    """List the prompts whose key equals that of a prompt of an earlier split.

    Each item is (prompt, its split, the earlier prompt, its split).
    """
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
    """Raise PrflError for a video that is in two splits or on both sides of a pair, even under different names.

    content: for each video, a value that is equal for equal bytes, such as a hash; other videos are not checked.
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
