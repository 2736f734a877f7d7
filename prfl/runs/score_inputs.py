"""The inputs of ``prfl score``: files, folders, patterns and manifests, each video with its prompt."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prfl.data.folder import prompt_beside
from prfl.data.manifest import manifest_videos, read_manifest
from prfl.data.video import SUFFIXES
from prfl.utils.errors import Faults, PrflError
from prfl.utils.files import CACHE_TAG

LATENTS = ".safetensors"


@dataclass(frozen=True)
class Item:
    """A file to score: a video or latents, and the prompt that it was made from."""

    file: Path
    prompt: str


@dataclass(frozen=True)
class Scored:
    """Normalised scores of one sample of a file at one noise level, the mean over the noise draws."""

    file: str
    sample: int
    prompt: str
    sigma: float
    scores: dict[str, float]


def read_items(inputs: Sequence[str], prompt: str | None, follow_links: bool) -> list[Item]:
    """List every file once.

    inputs: files; folders, of which every video and latents file below is taken; patterns such as ``clips/*.mp4``; and
    manifests (.jsonl), whose rows bring their prompts.  The prompt of any other file is the text of the .txt beside it,
    as ``a.mp4`` and ``a.txt`` (``prompt_beside``), or else ``prompt``.
    Raises PrflError for an input that is absent or empty, of no known kind, or has no prompt.
    """
    items: list[Item] = []
    faults = Faults()
    for name in inputs:
        with faults.collected():
            items += _items_of(name, prompt, follow_links)
    faults.raise_all("prfl score", "inputs")
    return list(dict.fromkeys(items))


def _items_of(name: str, prompt: str | None, follow_links: bool) -> list[Item]:
    path = Path(name)
    if path.suffix == ".jsonl":
        rows = read_manifest(path, follow_links=follow_links)
        return [Item(_shown(file), row.prompt) for row in rows for file in manifest_videos([row])]
    if path.is_dir():
        return _several(name, files_below(path), prompt)
    if not path.exists() and glob.has_magic(name):
        return _several(name, [Path(file) for file in glob.glob(name, recursive=True)], prompt)
    if path.suffix.lower() not in (*SUFFIXES, LATENTS):
        kinds = f"a video ({', '.join(SUFFIXES)}), latents ({LATENTS}), a folder of them or a manifest (.jsonl)"
        raise PrflError(f"'{path.suffix}' cannot be scored", where=name, fix=f"give {kinds}")
    if not path.is_file():
        fix = "give the path of a video, a latents file, a folder or a manifest"
        raise PrflError("there is no such file", where=name, fix=fix)
    return [Item(path, _prompt_of(path, prompt))]


def files_below(folder: Path) -> list[Path]:
    """List every file below a folder, but for those that prfl can make again, such as copies for a browser."""
    return [file for file in folder.rglob("*") if file.is_file() and not (file.parent / CACHE_TAG).is_file()]


def _several(name: str, files: Sequence[Path], prompt: str | None) -> list[Item]:
    """The videos and latents among files, by name."""
    chosen = sorted(file for file in files if file.suffix.lower() in (*SUFFIXES, LATENTS))
    if not chosen:
        fix = f"give a folder or a pattern of {', '.join(SUFFIXES)} or {LATENTS} files"
        raise PrflError("there are no videos and no latents in it", where=name, fix=fix)
    return [Item(file, _prompt_of(file, prompt)) for file in chosen]


def _prompt_of(file: Path, prompt: str | None) -> str:
    if text := prompt_beside(file):
        return text
    if prompt is None:
        text = file.with_suffix(".txt").name
        fix = f'--prompt "what the video shows", a {text} beside it, or a manifest (.jsonl) with prompts'
        raise PrflError("a reward reads the prompt too, and this file has none", where=str(file), fix=fix)
    return prompt


def _shown(file: Path) -> Path:
    """Return the path relative to here where it lies below: shorter, and no secret of the machine."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
