"""``prfl eval --benchmark``: how often a saved reward agrees with people on a public set of pairs, or on a manifest.

Accuracy without ties is the share of the pairs that people decided which the scores order as they did.  Accuracy with
ties is of three classes, a, b and tie: scores that differ by less than a threshold call a tie, and the threshold is the
best one for this set (Deutsch, Foster, Freitag, "Ties Matter", arXiv 2305.14324), as the published figures have it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from prfl.backbone import Ask, Backbone
from prfl.data.conditions import remember
from prfl.data.dataset import labels_only
from prfl.data.manifest import LabelledVideo, PreferencePair, read_manifest
from prfl.evaluation import metrics
from prfl.evaluation.benchmark_table import Published, benchmark_table
from prfl.evaluation.reward_eval import OVERALL, HeldOut, held_out
from prfl.factory.evaluation import build_latents_scorer
from prfl.factory.reward import add_to_card, load_reward, reward_path
from prfl.reward.checkpoint import find_reward, read_config
from prfl.reward.checkpoint_schema import BenchmarkScores
from prfl.runs.score import Scorer, ask_of, check_options, clip_of, find_backbone, read_latents, takes_frames
from prfl.training.metrics import peak_gib, reset_peak
from prfl.utils.console import console, progress, warn
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write
from prfl.utils.hashing import remembered_hash
from prfl.utils.pictures import read_first_frame

ALL_IN_ALL = ("overall", OVERALL)  # such a dimension of a set is compared with the sum of a reward's scores
SHOWN = 5  # videos that cannot be read and are named

Row = LabelledVideo | PreferencePair
Item = tuple[Path, str]  # a video and its prompt
Levels = dict[float, dict[str, float]]  # scores of an item by noise level and dimension


@dataclass(frozen=True)
class Benchmark:
    """What is measured, and how.

    name, title, dataset: what it is called, and its hub id.  manifest: of videos or pairs; only rows with the split
    test count where any has it.  left_out: rows whose videos are not there.  published: others' figures.
    dimensions: by name in the reward, the set's; empty: those of one name, and the sum of all for ``Overall``.
    most: take no more rows, evenly.
    """

    name: str
    title: str
    manifest: Path
    dataset: str | None = None
    left_out: int = 0
    published: Sequence[Published] = ()
    dimensions: Mapping[str, str] = field(default_factory=dict)
    sigmas: Sequence[float] = (0.0, 0.5)
    noise_draws: int = 1
    seed: int = 0
    most: int | None = None
    clip: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    dtype: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def rows(self) -> list[Row]:
        """Read the rows that count."""
        rows: list[Row] = list(read_manifest(self.manifest))
        if any(row.split == "test" for row in rows):
            rows = [row for row in rows if row.split == "test"]
        step = max(1, -(-len(rows) // self.most)) if self.most else 1
        return rows[::step]


def run_benchmark(benchmark: Benchmark, heads: Mapping[str, str], out: Path) -> None:
    """Measure every reward, print the table beside the published figures, and write it to the rewards' cards.

    out: a folder for the scores, by which a stopped command goes on, and for the results.
    """
    check_options(None, benchmark.sigmas, benchmark.noise_draws, benchmark.clip)
    rows = benchmark.rows()
    measured: dict[str, BenchmarkScores] = {}
    for name, head in heads.items():
        measured[name] = measure_head(benchmark, rows, head, out)
        add_to_card(reward_path(head), benchmark.name, measured[name])
    results = {name: asdict(scores) for name, scores in measured.items()}
    with atomic_write(out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.say(f"{benchmark.title}: accuracy against people; with ties, at the best threshold of this set")
    console.print(benchmark_table(measured, benchmark.published))
    for name, scores in measured.items():
        console.say(f"{name}: {scores.pairs_read} pairs, {scores.left_out} left out; {scores.cost}")
    console.say(f"results: {out / 'results.json'}")


@torch.no_grad()
def measure_head(benchmark: Benchmark, rows: Sequence[Row], head: str, out: Path) -> BenchmarkScores:
    """Score the videos of all rows and compare.  Raises PrflError where the reward and the set share no dimension."""
    source = str(reward_path(head))
    backbone = find_backbone(source, read_config(source), benchmark.model, benchmark.dtype, benchmark.device)
    reward = load_reward(source, backbone)
    compared = compared_dimensions(reward.dimensions, list(pairs_of(rows).pairs), benchmark)
    scorer = Scorer(backbone, reward, build_latents_scorer(reward, backbone), benchmark.noise_draws, benchmark.seed)
    clip = clip_of(reward.card, benchmark.clip)

    # Each video once with each of its prompts.
    items = list(dict.fromkeys((video, row.prompt) for row in rows for video in videos_of(row)))
    facts = {
        "reward": find_reward(source).config.weights_sha256, "clip": clip, "sigmas": list(benchmark.sigmas),
        "noise_draws": benchmark.noise_draws, "seed": benchmark.seed,
    }  # fmt: skip
    store = ScoreStore(out / f"{Path(source).resolve().parent.name}-{Path(source).name}.jsonl", facts)
    reset_peak(backbone.facts.device)
    todo = [item for item in items if item not in store.scores]
    failed = without_frame(backbone, todo, clip)
    asks = {item: ask_of(backbone, *item, clip) for item in todo if item[0] not in failed}
    remember(backbone, asks.values(), progress("encoding the prompts"))
    failed |= score_items(scorer, store, asks, clip, benchmark.sigmas)

    kept = [row for row in rows if all((video, row.prompt) in store.scores for video in videos_of(row))]
    if failed:
        names = "; ".join(f"{path}: {reason}" for path, reason in list(failed.items())[:SHOWN])
        warn(f"{len(failed)} videos cannot be read, and {len(rows) - len(kept)} rows are left out: {names}")
    if not kept:
        fix = "see the reasons above; --frames and --fps say how much of a video is read"
        raise PrflError("no row has videos that can be read", where=str(benchmark.manifest), fix=fix)
    return compare(benchmark, kept, len(rows) - len(kept), store, compared, backbone.facts.device)


def videos_of(row: Row) -> list[Path]:
    return [row.video] if isinstance(row, LabelledVideo) else [row.a, row.b]


def pairs_of(rows: Sequence[Row]) -> HeldOut:
    """List the pairs of each dimension; of rated videos, every two of a prompt."""
    return held_out(labels_only(rows))


def compared_dimensions(dimensions: Sequence[str], asked: Sequence[str], benchmark: Benchmark) -> dict[str, list[str]]:
    """Find, for each of the set's dimensions (``asked``), those of the reward whose sum is compared with it."""
    compared: dict[str, list[str]] = {}
    for name in asked:
        mapped = [name_in_head for name_in_head, other in benchmark.dimensions.items() if other == name]
        same = [name_in_head for name_in_head in dimensions if name_in_head.lower() == name.lower()]
        if chosen := mapped or same or (list(dimensions) if name.lower() in ALL_IN_ALL else []):
            compared[name] = chosen
    for name_in_head, other in benchmark.dimensions.items():
        if name_in_head not in dimensions or other not in asked:
            what = f"{name_in_head}={other} names no dimension of both"
            raise PrflError(what, where="--dimensions", fix=_known(dimensions, asked))
    if not compared:
        what = "the reward and the set share no dimension"
        raise PrflError(what, where="--dimensions", fix=_known(dimensions, asked))
    return compared


def _known(dimensions: Sequence[str], asked: Sequence[str]) -> str:
    """Say what can be compared."""
    of_both = f"the reward has {', '.join(dimensions)}, the set {', '.join(asked)}"
    return f"--dimensions {dimensions[0]}={asked[0]}: {of_both}"


class ScoreStore:
    """Scores of items on disk, as they come: a stopped command goes on behind the last one.

    Those of another reward, of other clips or noise levels are dropped.  times: seconds of reading and encoding, and
    of scoring, of the items of this command.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.scores: dict[Item, Levels] = {}
        self.seconds = 0.0
        first = json.dumps(facts, sort_keys=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines and lines[0] == first:
            for line in lines[1:]:
                self._take(line)
        else:
            with atomic_write(path) as temporary:
                temporary.write_text(first + "\n", encoding="utf-8")

    def _take(self, line: str) -> None:
        try:
            row = json.loads(line)
            item = Path(row["video"]), row["prompt"]
            if row["content"] == remembered_hash(item[0]):
                self.scores[item] = {float(sigma): scores for sigma, scores in row["scores"].items()}
                self.seconds += row["seconds"]
        except (ValueError, KeyError, TypeError, OSError):  # a line that a crash cut, or a video that is gone
            return

    def add(self, item: Item, scores: Levels, seconds: float) -> None:
        self.scores[item], self.seconds = scores, self.seconds + seconds
        row = {"video": str(item[0]), "prompt": item[1], "content": remembered_hash(item[0]), "scores": scores}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "seconds": seconds}, ensure_ascii=False) + "\n")


def without_frame(backbone: Backbone, items: Sequence[Item], clip: Mapping[str, Any]) -> dict[Path, str]:
    """Find, where the model takes first frames, the videos that have none to be read, with the reasons."""
    failed = {}
    for video in dict.fromkeys(video for video, _ in items) if takes_frames(backbone) else ():
        try:
            read_first_frame(video, clip["height"], clip["width"])
        except PrflError as error:
            failed[video] = error.one_line
    return failed


def score_items(
    scorer: Scorer, store: ScoreStore, asks: Mapping[Item, Ask], clip: Mapping[str, Any], sigmas: Sequence[float]
) -> dict[Path, str]:
    """Score videos at every noise level; returns those that cannot be read, with the reasons.

    asks: what each is scored for.
    """
    failed = {}
    for item, ask in progress("scoring")(list(asks.items())):
        started = time.perf_counter()
        try:
            latents = read_latents(item[0], scorer.backbone, clip)
        except PrflError as error:
            failed[item[0]] = error.one_line
            continue
        condition = scorer.backbone.condition([ask])
        levels = {}
        for sigma in sigmas:
            scores = scorer.at(latents, sigma, condition)
            levels[sigma] = {name: float(values[0]) for name, values in scores.items()}
        store.add(item, levels, time.perf_counter() - started)
    return failed


def compare(
    benchmark: Benchmark,
    rows: Sequence[Row],
    unreadable: int,
    store: ScoreStore,
    compared: Mapping[str, Sequence[str]],
    device: torch.device,
) -> BenchmarkScores:
    """Compute both accuracies of each dimension and noise level."""
    data = pairs_of(rows)
    sides = list(zip(*(videos_of(row) for row in rows), strict=True))
    prompts = [row.prompt for row in rows]
    items = [(video, prompt) for side in sides for video, prompt in zip(side, prompts, strict=True)]

    accuracy: dict[str, dict[str, float]] = {}
    with_ties: dict[str, dict[str, float]] = {}
    for name, summed in compared.items():
        pairs = data.pairs[name]
        if not len(pairs.decided()):
            warn(f"{benchmark.name}: no pair of {name} is decided")
            continue
        for sigma in benchmark.sigmas:
            scores = torch.tensor([sum(store.scores[item][sigma][each] for each in summed) for item in items])
            threshold = metrics.tie_threshold(scores, pairs)
            level = f"{sigma:g}"
            accuracy.setdefault(name, {})[level] = round(metrics.pairwise_accuracy(scores, pairs).value, 4)
            ties = metrics.pairwise_accuracy_ties(scores, pairs, threshold)
            with_ties.setdefault(name, {})[level] = round(ties.value, 4)
    sizes = {name: (len(data.pairs[name].decided()), len(data.pairs[name])) for name in accuracy}
    return BenchmarkScores(
        title=benchmark.title,
        dataset=benchmark.dataset,
        accuracy=accuracy,
        accuracy_ties=with_ties,
        decided={name: decided for name, (decided, _) in sizes.items()},
        ties={name: every - decided for name, (decided, every) in sizes.items()},
        pairs_read=max((every for _, every in sizes.values()), default=0),
        left_out=benchmark.left_out + unreadable,
        seconds=round(2 * store.seconds / len(store.scores), 4),
        gib=None if (peak := peak_gib(device)) is None else round(peak, 2),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    )
