"""What people are asked: of a folder of videos or a manifest, which pairs and which questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prfl.data.folder import split_of
from prfl.data.manifest import LabelledVideo, PreferencePair, read_manifest
from prfl.data.video import SUFFIXES
from prfl.labels.pairs import Pair, all_pairs, spread, with_splits
from prfl.runs.score_inputs import files_below, read_items
from prfl.utils.console import console, warn
from prfl.utils.errors import PrflError

MANY = 1000  # pairs, from which on a limit is advised
MANIFEST, PAGE = "manifest.jsonl", "label.html"


@dataclass(frozen=True)
class Asked:
    """Pairs in the order in which they are asked, with the folder that their names are below, and the questions."""

    folder: Path
    pairs: list[Pair]
    questions: dict[str, str]


def asked_of(
    source: Path,
    questions: Mapping[str, str],
    *,
    prompt: str | None = None,
    count: int | None = None,
    choose: Literal["all", "uncertain"] = "all",
    heads: Sequence[str] = (),
    model: str | None = None,
    follow_links: bool = False,
) -> Asked:
    """Choose the pairs of a manifest, or of a folder of videos with their prompts beside them.

    questions: by dimension, "" where nobody worded one; {} asks which is better overall, or what the head scores.
    prompt: of videos without a .txt.  count: how many pairs; None is all.  choose: with ``uncertain``, the pairs come
    first that one head is least sure of, or on which several differ most; model: that they read.
    Raises PrflError where no prompt has two videos.
    """
    if count is not None and count < 1:
        raise PrflError(f"{count} pairs leave nothing to compare", where="--pairs", fix="1 or more")
    if (choose == "uncertain") != bool(heads):
        fix = "--choose uncertain --head FOLDER, both or neither"
        raise PrflError("a head is what is uncertain", where="--choose, --head", fix=fix)
    folder, rows = read_rows(source, prompt, follow_links)
    pairs = with_splits(all_pairs(folder, rows))
    if not pairs:
        what = f"{len(rows)} videos of {len({row.prompt for row in rows})} prompts, none of which has two to compare"
        fix = "two or more videos of one prompt, word for word the same; prfl sample --per-prompt 4 draws them"
        raise PrflError(what, where=str(source), fix=fix)

    if count is None and len(pairs) > MANY:
        warn(f"{len(pairs)} pairs are more than people answer: --pairs 200 asks the first 200, of all prompts in turn")
    uncertainty = None
    if heads:
        from prfl.labels.uncertain import uncertainties

        uncertainty, scored = uncertainties(folder, pairs, heads, model, set(questions))
        questions = questions or dict.fromkeys(scored, "")
    worded = {name: text or question_of(name) for name, text in (questions or {"overall": ""}).items()}
    return Asked(folder, spread(pairs, uncertainty)[:count], worded)


def question_of(dimension: str) -> str:
    """Word the question of a dimension for which nobody wrote one."""
    return "Which is better overall?" if dimension == "overall" else f"Which is better: {dimension}?"


def read_rows(
    source: Path, prompt: str | None, follow_links: bool
) -> tuple[Path, list[LabelledVideo] | list[PreferencePair]]:
    """Read the rows of a manifest, or one for each video below a folder; returns the folder that names are below, too.

    A folder that has a ``manifest.jsonl`` is read by it; its folders train, validation and test are splits.
    Raises PrflError for every video without a prompt.
    """
    if source.is_dir() and (source / MANIFEST).is_file():
        console.say(f"the videos are those of {source / MANIFEST}")
        source = source / MANIFEST
    folder = (source if source.is_dir() else source.parent).resolve()
    if not source.is_dir():
        return folder, read_manifest(source, follow_links=follow_links)
    files = sorted(file for file in files_below(folder) if file.suffix.lower() in SUFFIXES)
    if not files:
        fix = f"a folder of {', '.join(SUFFIXES)} files, or a manifest (.jsonl)"
        raise PrflError("there are no videos in it", where=str(source), fix=fix)
    items = read_items([str(file) for file in files], prompt, follow_links)
    return folder, [
        LabelledVideo(item.file, item.prompt, {}, split_of(item.file.relative_to(folder))) for item in items
    ]


def tell(asked: Asked) -> None:
    """Say what is asked, and warn where nothing of it will measure the reward."""
    videos = {name for pair in asked.pairs for name in (pair.a, pair.b)}
    prompts = {pair.prompt for pair in asked.pairs}
    held = sum(pair.held_out for pair in asked.pairs)
    console.say(
        f"{len(asked.pairs)} pairs of {len(videos)} videos and {len(prompts)} prompts, {held} of them held out; "
        f"asked is {', '.join(asked.questions)}"
    )
    if not held:
        warn(
            "no pair is held out (split validation): a reward that is trained on these answers cannot be measured; "
            "give the videos of two or more prompts, or rows with that split"
        )
