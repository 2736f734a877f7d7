"""JSONL manifests: labelled videos, or pairs of videos with a preference.

    {"video": "clips/a.mp4", "prompt": "a dog runs", "label": {"motion": 1, "text": 0.5}, "split": "train"}
    {"prompt": "a dog runs", "a": "clips/a.mp4", "b": "clips/b.mp4", "preference": {"motion": "a"}}

Paths are relative to the manifest's folder, or to a ``root`` that the user names, and must stay inside it: a manifest
from somebody else must not make us read other files.  Symbolic links must stay inside too, unless the user lets them
lead out (``data.follow_links``); the files of a snapshot of the Hugging Face hub are such links.  ``label`` and
``split`` may be left out.  One prompt belongs to one split: with a prompt in both train and test, every held-out figure
would be wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prfl.utils.errors import AbsentError, Faults, PrflError
from prfl.utils.files import atomic_write
from prfl.utils.reading import json_rows, printable
from prfl.utils.text import did_you_mean

Choice = Literal["a", "b", "tie"]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class LabelledVideo:
    """A video with its prompt and named labels in [0, 1] (1 is good).  ``label`` is empty where it has none."""

    video: Path
    prompt: str
    label: dict[str, float]
    split: str | None = None


@dataclass(frozen=True)
class PreferencePair:
    """Two videos for one prompt and, for each named dimension, which is better."""

    prompt: str
    a: Path
    b: Path
    preference: dict[str, Choice]
    split: str | None = None


Text = Annotated[str, Field(min_length=1)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True)
    prompt: Text
    split: Split | None = None


class _VideoRow(_Row):
    video: Text
    label: dict[Text, Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]] = {}


class _PairRow(_Row):
    a: Text
    b: Text
    preference: Annotated[dict[Text, Choice], Field(min_length=1)]
    rater: Text | None = None
    both_bad: list[Text] = []  # the dimensions with a tie because both videos are bad


def read_manifest(
    path: str | Path, *, root: Path | None = None, follow_links: bool = False
) -> list[LabelledVideo] | list[PreferencePair]:
    """Read the rows of a manifest, which are all of one kind, with their paths resolved.

    root: the folder that the videos' paths are relative to; None for the manifest's own folder.  follow_links: whether
    symbolic links may lead out of it.  Raises PrflError that names file and line of every fault.
    """
    return parse_rows(json_rows(Path(path)), Path(path), root=root, follow_links=follow_links)


def prompts_by_split(path: str | Path) -> dict[str | None, list[str]]:
    """Read the prompts of each split, once each.  The key None holds those of rows without a split.

    The videos are not looked for.
    """
    splits: dict[str | None, dict[str, None]] = {}
    faults = Faults()
    for where, fields in json_rows(Path(path)):
        with faults.collected():
            row = checked(_PairRow if _is_pair(fields) else _VideoRow, fields, where)
            splits.setdefault(row.split, {})[row.prompt] = None
    faults.raise_all(path)
    return {split: list(prompts) for split, prompts in splits.items()}


def parse_rows(
    rows: Sequence[tuple[str, dict[str, Any]]],
    path: Path,
    faults: Faults | None = None,
    *,
    root: Path | None = None,
    follow_links: bool = False,
) -> list[LabelledVideo] | list[PreferencePair]:
    """Turn (``file:line``, fields) into rows.  They come from a manifest, or from a data set in another format.

    path: the file that they come from.  root: the folder that the videos' paths are relative to and must stay inside;
    None for the folder of ``path``.  follow_links: whether symbolic links may lead out of it.  faults: the faults of
    rows that could not be read at all; they are raised together with those found here.
    Raises PrflError with every fault.
    """
    faults = faults or Faults()
    if root is not None and not root.is_dir():
        fix = "name the folder that the manifest's paths are relative to"
        raise AbsentError(f"there is no such folder: {root}", path=root, where="data.root", fix=fix)
    folder = _Folder(root or path.parent, "data.root" if root else "the manifest's folder")
    if not rows and not faults.errors:
        raise PrflError("holds no rows", where=str(path), fix="write one JSON object on each line")

    pairs = bool(rows) and _is_pair(rows[0][1])
    checked_rows: list[Any] = []
    first_line: dict[tuple[Path, str], str] = {}
    splits: dict[str, tuple[str | None, str]] = {}
    for where, fields in rows:
        with faults.collected():
            if _is_pair(fields) != pairs:
                kinds = ("a video", "a pair") if pairs else ("a pair", "a video")
                fix = "keep videos and pairs in two manifests"
                raise PrflError(f"is {kinds[0]}, but the first row is {kinds[1]}", where=where, fix=fix)

            row = _pair(fields, folder, where, follow_links) if pairs else _video(fields, folder, where, follow_links)
            _check_split(row, splits, where)
            if isinstance(row, LabelledVideo):
                first = first_line.setdefault((row.video, row.prompt), where)
                if first != where:
                    fix = "keep one of the two rows"
                    raise PrflError(f"the same video and prompt stand already at {first}", where=where, fix=fix)
            checked_rows.append(row)
    faults.raise_all(path)
    return checked_rows


def manifest_videos(rows: Sequence[LabelledVideo | PreferencePair]) -> list[Path]:
    """List the videos of a manifest's rows, once each, in the order of the rows."""
    videos: list[Path] = []
    for row in rows:
        videos += [row.video] if isinstance(row, LabelledVideo) else [row.a, row.b]
    return list(dict.fromkeys(videos))


def write_manifest(
    path: str | Path, rows: Sequence[LabelledVideo | PreferencePair], *, root: Path | None = None
) -> None:
    """Write a manifest, atomically, with paths relative to ``root`` (None: to the manifest's own folder).

    Raises PrflError for a path outside that folder.
    """
    path = Path(path)
    folder = root or path.parent
    lines = []
    for row in rows:
        fields: dict[str, Any]
        if isinstance(row, LabelledVideo):
            fields = {"video": _relative(row.video, folder, path), "prompt": row.prompt, "label": row.label}
        else:
            fields = {"prompt": row.prompt, "a": _relative(row.a, folder, path), "b": _relative(row.b, folder, path)}
            fields["preference"] = row.preference
        if row.split is not None:
            fields["split"] = row.split
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def checked(model: type[BaseModel], fields: dict[str, Any], where: str) -> Any:
    """Check a row's fields against its model and return ``model(**fields)``.

    Raises PrflError for the first fault, with the key and its value.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            fix = did_you_mean(key, list(model.model_fields))
            raise PrflError(f"unknown key '{key}'", where=where, fix=fix) from error
        if fault["type"] == "missing":
            raise PrflError(f"the key '{key}' is missing", where=where, fix=f"add '{key}' to this row") from error
        value = str(fault["input"])[:80]
        raise PrflError(f"'{key}': {fault['msg']}; found {value!r}", where=where, fix="mend this row") from error


def _is_pair(fields: dict[str, Any]) -> bool:
    return not {"a", "b", "preference"}.isdisjoint(fields)


def _video(fields: dict[str, Any], folder: _Folder, where: str, follow_links: bool) -> LabelledVideo:
    row = checked(_VideoRow, fields, where)
    return LabelledVideo(_inside(row.video, folder, where, follow_links), row.prompt, row.label, row.split)


def _pair(fields: dict[str, Any], folder: _Folder, where: str, follow_links: bool) -> PreferencePair:
    row = checked(_PairRow, fields, where)
    sides, faults = [], Faults()
    for name in (row.a, row.b):
        with faults.collected():
            sides.append(_inside(name, folder, where, follow_links))
    if len(faults.errors) == 2:
        first, second = faults.errors
        raise PrflError(f"{first.what}; {second.what}", where=where, fix=first.fix)
    faults.raise_all(where)
    a, b = sides
    if a.resolve() == b.resolve():
        raise PrflError(f"both sides of the pair are {row.a}", where=where, fix="name two videos")
    return PreferencePair(row.prompt, a, b, row.preference, row.split)


@dataclass(frozen=True)
class _Folder:
    """The folder that holds a manifest's videos.  called: how an error message refers to it."""

    path: Path
    called: str


def _inside(name: str, root: _Folder, where: str, follow_links: bool) -> Path:
    """Find the file that a row names, with links resolved.  Raises PrflError if it is outside of ``root`` or not there.

    A link that leads out is returned as it is: its target, such as a blob of the hub's cache, may have no suffix.
    """
    folder = root.path.resolve()
    try:
        link = Path(os.path.normpath(folder / name))
        target = (folder / name).resolve()
        exists = target.is_file()
    except (OSError, ValueError) as error:  # a name too long, a null byte
        raise PrflError(f"{name[:80]!r} cannot be a file name: {error}", where=where, fix="mend the path") from error

    leaves = not target.is_relative_to(folder)
    if leaves and not (link.is_relative_to(folder) and link.resolve() == target):
        fix = "move the file, put the manifest into a folder above it, or name that folder: data.root=FOLDER"
        raise PrflError(f"{name!r} leaves {root.called}", where=where, fix=fix)
    if leaves and not follow_links:
        fix = "data.follow_links=true (prfl score: --follow-links), or put the manifest into a folder above it"
        raise PrflError(f"{name!r} leaves {root.called} by a link", where=where, fix=fix)
    if not exists:
        raise PrflError(f"no such file: {name}", where=where, fix=f"paths are relative to {root.path}")
    return link if leaves else target


def _relative(file: Path, root: Path, manifest: Path) -> str:
    """Name a file relative to ``root``.  A link inside ``root`` that leads out is named by its own path."""
    folder, path = root.resolve(), file.resolve()
    if not path.is_relative_to(folder):
        path = file.parent.resolve() / file.name
    if not path.is_relative_to(folder):
        fix = "put the manifest into a folder above its videos"
        raise PrflError(f"{file} is outside the manifest's folder", where=str(manifest), fix=fix)
    name = path.relative_to(folder).as_posix()
    if name != printable(name):
        what = f"the name {printable(name)} is not UTF-8, as a manifest is"
        raise PrflError(what, where=str(manifest), fix="rename the file")
    return name


def _check_split(row: LabelledVideo | PreferencePair, splits: dict[str, tuple[str | None, str]], where: str) -> None:
    split, first = splits.setdefault(row.prompt, (row.split, where))
    if split != row.split:
        what = f"this prompt is in split {row.split!r} here and in {split!r} at {first}"
        raise PrflError(what, where=where, fix="give every row of a prompt the same split")
