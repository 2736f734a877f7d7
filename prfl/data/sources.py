"""Find a user's videos in a folder, and report what is left out, such as files outside of it and what prfl wrote."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prfl.utils.errors import PrflError
from prfl.utils.files import written_by_prfl
from prfl.utils.formats import SUFFIXES
from prfl.utils.hashing import content_hash
from prfl.utils.reading import absent
from prfl.utils.text import visible

FOLLOW = "data.follow_links=true, to read what they lead to"
OUTSIDE = "links that lead out of the folder"


@dataclass
class Sources:
    """The videos, in order, and the paths that are left out, by reason."""

    videos: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: Path) -> None:
        """Note a file or folder that is left out."""
        self.left_out.setdefault(reason, []).append(path)


def find_videos(path: Path, *, follow_links: bool = False, skip_unreadable: bool = False) -> Sources:
    """Find every video in a folder and the folders below it, or a single file.  Hidden files are left out.

    Links that lead out of the folder are followed with ``follow_links``.  Without it they are an error or, with
    ``skip_unreadable``, left out.  Raises PrflError for such links, for a folder that prfl wrote, and if there is no
    video.
    """
    inside = next((folder for folder in [path, *path.absolute().parents] if written_by_prfl(folder)), None)
    if inside is not None:
        what = f"lies in {inside}, which prfl wrote: its clips would be cut from its own clips"
        raise PrflError(what, where=str(path), fix="name the folder of your own videos, or copy these out of there")
    fix = f"give a folder of videos ({', '.join(SUFFIXES)}), or one video"
    if not path.exists():
        raise absent(path, fix, "file or folder")
    if path.is_file():
        return Sources([path])

    sources = _walk(path, follow_links)
    outside = sources.left_out.get(OUTSIDE, [])
    if outside and not skip_unreadable:
        raise PrflError(f"holds {listed(OUTSIDE, outside)}", where=str(path), fix=f"{FOLLOW}, or take them away")
    if not sources.videos:
        what = "holds no videos" + "".join(f"; {listed(reason, paths)}" for reason, paths in sources.left_out.items())
        raise PrflError(what, where=str(path), fix=fix)
    return sources


def listed(reason: str, paths: Sequence[Path]) -> str:
    """Write ``3 hidden files (a, b, c)``: a count, the reason and the first names."""
    names = ", ".join(visible(path.name) for path in paths[:5])
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return f"{len(paths)} {reason} ({names}{more})"


def _walk(root: Path, follow_links: bool) -> Sources:
    """List the videos in a folder and in all folders below it."""
    sources = Sources()
    walked: set[Path] = set()  # linked folders may lead in a circle
    top = root.resolve()

    def closed(error: OSError) -> None:
        sources.leave_out("folders that cannot be opened", Path(error.filename))

    for name, folders, files in os.walk(root, onerror=closed, followlinks=True):
        folder = Path(name)
        walked.add(folder.resolve())

        # os.walk does not enter a folder that is removed from ``folders``.
        for path in sorted(folder / below for below in folders):
            reason = _no_folder(path, top, walked, follow_links)
            if reason:
                folders.remove(path.name)
                sources.leave_out(reason, path)
            elif path.suffix.lower() in SUFFIXES:
                sources.leave_out("folders with a video's suffix, of which the files in them are read", path)

        for path in sorted(folder / below for below in files):
            reason = _no_video(path, top, follow_links)
            if reason:
                sources.leave_out(reason, path)
            else:
                sources.videos.append(path)
    sources.videos.sort()
    _leave_out_copies(sources)
    return sources


def _no_folder(path: Path, top: Path, walked: Collection[Path], follow_links: bool) -> str:
    """Say why a folder is not walked, or ""."""
    if path.name.startswith("."):
        return "hidden folders"
    target = path.resolve()
    if path.is_symlink() and not target.is_relative_to(top) and not follow_links:
        return OUTSIDE
    if target in walked:
        return "links to folders that are read anyway"
    if any(written_by_prfl(folder) for folder in (target, *target.parents)):
        return "folders that prfl wrote"
    return ""


def _no_video(path: Path, top: Path, follow_links: bool) -> str:
    """Say why a file is left out, or ""."""
    if path.name.startswith("."):
        return "hidden files"
    if path.suffix.lower() not in SUFFIXES:
        return "files of other suffixes"
    if not path.is_symlink():
        return "" if path.is_file() else "that are no regular files"
    target = path.resolve()
    if not target.is_file():
        return "links to nothing"
    if not target.is_relative_to(top) and not follow_links:
        return OUTSIDE
    return "links to what prfl wrote" if any(written_by_prfl(folder) for folder in target.parents) else ""


def _leave_out_copies(sources: Sources) -> None:
    """Leave out copies of a video under other names: they would be trained on twice, or trained on and held out."""
    sizes = Counter(path.stat().st_size for path in sources.videos)
    first: dict[str, Path] = {}
    for path in [path for path in sources.videos if sizes[path.stat().st_size] > 1]:
        try:
            if first.setdefault(content_hash(path), path) != path:
                sources.leave_out("copies of others", path)
        except OSError:  # reported where the video is read
            continue
    copies = set(sources.left_out.get("copies of others", []))
    sources.videos = [path for path in sources.videos if path not in copies]
