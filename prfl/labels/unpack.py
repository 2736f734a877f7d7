"""Videos that lie inside a table, in a parquet file or a data set of the hub, written out as files.

    FOLDER/videos/000012-video.mp4, with its prompt in 000012-video.txt where there is one; FOLDER/table.jsonl

The table has every other column as it was, and the file's path in place of a video, for ``prfl labels import``.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from prfl.labels.layout import known_as
from prfl.utils.console import progress
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write

TABLE = "table.jsonl"
BATCH = 16  # rows of a parquet file in memory at once


def unpack(source: str, folder: Path, split: str = "train", most: int | None = None) -> str:
    """Write the videos and the table; returns what was written, and what to do next, in words.

    source: a parquet file, a folder of them, or ``owner/name`` of the hub, with ``:config`` behind it where it has
    several.  split: of the hub's.  most: take no more rows.
    Raises PrflError where there is a table already, for a source that cannot be read, and for one without videos.
    """
    if (folder / TABLE).exists():
        raise PrflError(f"there is a {TABLE} already", where=str(folder), fix="name another folder, or remove it")
    path = Path(source)
    rows = parquet_rows(path) if path.exists() else hub_rows(source, split)

    table: list[dict[str, Any]] = []
    columns: dict[str, int] = {}  # of videos, with how many
    with closing(rows):
        for number, row in enumerate(progress("writing videos")(islice(rows, most))):
            cells = dict(row)
            for name, value in row.items():
                if (content := video_bytes(value)) is not None:
                    file = folder / "videos" / f"{number:06d}-{name}{kind_of(content)}"
                    with atomic_write(file) as temporary:
                        temporary.write_bytes(content)
                    cells[name] = str(file.relative_to(folder))
                    columns[name] = columns.get(name, 0) + 1
                elif isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
                    del cells[name]  # a picture, say
            table.append(cells)
    if not columns:
        fix = "prfl labels import reads a table whose videos are files beside it"
        raise PrflError(f"no column of its {len(table)} rows has videos in it", where=source, fix=fix)

    prompt = known_as("prompt", list(table[0]))
    written = write_prompts(folder, table, list(columns), prompt) if prompt else 0
    with atomic_write(folder / TABLE) as temporary:
        lines = (json.dumps(cells, ensure_ascii=False, default=str) + "\n" for cells in table)
        temporary.write_text("".join(lines), encoding="utf-8")
    told = ", ".join(f"{count} videos of column {name}" for name, count in columns.items())
    text = [f"{folder / TABLE}: {len(table)} rows; {told}"]
    text += [f"labels: prfl labels import {folder / TABLE} --preset NAME (or --columns, --dimensions)"]
    text += [f"prompts beside the videos: prfl init {folder / 'videos'}, or data.folder"] if written else []
    return "\n  ".join(text)


def write_prompts(folder: Path, table: list[dict[str, Any]], videos: list[str], prompt: str) -> int:
    """Write a row's prompt beside each of its videos; returns how many."""
    count = 0
    for cells in table:
        text = str(cells.get(prompt) or "").strip()
        for name in videos:
            if text and cells.get(name):
                with atomic_write((folder / cells[name]).with_suffix(".txt")) as temporary:
                    temporary.write_text(f"{text}\n", encoding="utf-8")
                count += 1
    return count


def video_bytes(value: Any) -> bytes | None:
    """Return the content of a cell that is a video: its bytes, or {"bytes": ..., "path": ...}; None for another."""
    content = value.get("bytes") if isinstance(value, Mapping) else value
    return content if isinstance(content, bytes) and kind_of(content) else None


def kind_of(content: bytes) -> str:
    """Tell a video's suffix by its first bytes; empty for what is none."""
    if content[4:8] == b"ftyp":
        return ".mp4"
    if content[:4] == b"\x1aE\xdf\xa3":
        return ".webm" if b"webm" in content[:64] else ".mkv"
    return ".gif" if content[:4] == b"GIF8" else ""


def parquet_rows(path: Path) -> Generator[dict[str, Any], None, None]:
    """Read a parquet file, or all in a folder by name, a few rows at a time."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        fix = "pip install pyarrow (or prfl[parquet])"
        raise PrflError("reading parquet needs the package pyarrow", where=str(path), fix=fix) from error
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise PrflError("holds no parquet file", where=str(path), fix="name a .parquet file, or a folder of them")
    for file in files:
        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=BATCH):
                yield from batch.to_pylist()
        except (OSError, ArrowException) as error:
            raise PrflError(f"is not a parquet file: {error}", where=str(file), fix="download it again") from error


def hub_rows(source: str, split: str) -> Generator[dict[str, Any], None, None]:
    """Read a data set of the hub as it streams; videos are left encoded."""
    name, _, config = source.partition(":")
    if name.count("/") != 1:
        fix = "a .parquet file, a folder of them, or owner/name of the hub"
        raise PrflError("there is no such file, and it is no data set of the hub", where=source, fix=fix)
    try:
        import datasets
    except ImportError as error:
        fix = "pip install datasets (or prfl[hub-data])"
        raise PrflError("a data set of the hub needs the package datasets", where=source, fix=fix) from error
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for column, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Video | datasets.Image):
                rows = rows.cast_column(column, type(feature)(decode=False))
        for row in rows:
            yield {column: _fetched(value) for column, value in row.items()}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fix = "look at its page for its configs and splits, owner/name:config --split NAME, and at the connection"
        raise PrflError(f"cannot be read: {str(error).splitlines()[0]}", where=source, fix=fix) from error


def _fetched(value: Any) -> Any:
    """Read a video that the data set names by a path of its own."""
    if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path"):
        import fsspec  # datasets brings it

        with fsspec.open(value["path"], "rb") as file:
            return {**value, "bytes": file.read()}
    return value
