"""The public sets that rewards are measured on by name, and what others published on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prfl.data.manifest import read_manifest
from prfl.evaluation.benchmark_table import Published
from prfl.labels.presets import PRESETS
from prfl.labels.reading import read_table
from prfl.labels.table import import_table
from prfl.runs.benchmark import Benchmark
from prfl.utils.console import console
from prfl.utils.errors import Faults, PrflError
from prfl.utils.text import did_you_mean


@dataclass(frozen=True)
class PublicSet:
    """table: the file of its labels, in the folder of its videos, in the layout of the preset of its name."""

    title: str
    dataset: str
    table: str
    published: Sequence[Published]


SETS = {
    "videogen-rewardbench": PublicSet(
        "VideoGen-RewardBench",
        "KlingTeam/VideoGen-RewardBench",
        "videogen-rewardbench.csv",
        (
            Published("VideoReward (pixels)", "Overall", "clean", 73.59, 61.26),
            Published("VideoReward (pixels)", "VQ", "clean", 75.66, 59.68),
            Published("VideoReward (pixels)", "MQ", "clean", 74.70, 66.03),
            Published("VideoReward (pixels)", "TA", "clean", 72.20, 53.80),
            Published("PRISM, Wan 2.1 1.3B", "Overall", "t = 499", 73.43, 61.13),
            Published("PRISM, Wan 2.1 1.3B", "Overall", "t = 0", 72.93, 60.76),
            Published("PRISM, Wan 2.1 14B", "Overall", "t = 499", 75.78, 63.13),
        ),
    ),
}
"""VideoReward: the set's leaderboard; PRISM: arXiv 2606.20310.  Both on all of the set's pairs."""


def benchmark_of(named: str, root: Path | None) -> Benchmark:
    """Return the public set of this name, read from the folder ``root``, or a manifest of one's own.

    Videos that are not there are counted and left out.  Raises PrflError for a name that is neither, without a root.
    """
    if named in SETS:
        return _public(named, root)
    path = Path(named)
    if path.suffix != ".jsonl":
        fix = f"{did_you_mean(named, list(SETS))}; or a manifest (.jsonl) of pairs, or of rated videos"
        raise PrflError(f"there is no benchmark '{named}'", where="--benchmark", fix=fix)
    if root is not None:
        raise PrflError("a manifest's videos are below its own folder", where="--root", fix="leave it out")
    return Benchmark(name=path.stem, title=path.stem, manifest=path)


def _public(name: str, root: Path | None) -> Benchmark:
    public = SETS[name]
    if root is None:
        fix = f"--root FOLDER, where {public.table} and the videos of {public.dataset} are"
        raise PrflError("where is the set?", where=f"--benchmark {name}", fix=fix)
    table, layout = root / public.table, PRESETS[name]
    manifest = root / f"{name}.jsonl"
    console.say(import_table(table, manifest, layout, root, skip_missing=True))
    labelled = sum(layout.keep(row) for _, row in read_table(table, Faults()).rows)
    left_out = labelled - len(read_manifest(manifest))
    return Benchmark(
        name=name, title=public.title, manifest=manifest, dataset=public.dataset, left_out=left_out,
        published=public.published,
    )  # fmt: skip
