"""``prfl score``: a saved reward's scores of videos or latents, at chosen noise levels, as CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prfl.backbone import Ask, Backbone, Condition
from prfl.config import load_config
from prfl.config.section import is_hub_id
from prfl.config.sections.backbone import BackboneConfig
from prfl.data.leaks import token_ids, token_warnings
from prfl.data.video import read_video
from prfl.factory.api import load_backbone
from prfl.factory.backbone import build_backbone, choose_device
from prfl.factory.evaluation import LatentsScorer, build_latents_scorer
from prfl.factory.reward import TrainableReward, load_reward
from prfl.reward.checkpoint import RewardCard, read_config
from prfl.reward.inputs import check_latents
from prfl.rollout.flow import add_noise
from prfl.runs.ranking import Ranking
from prfl.runs.score_inputs import LATENTS, Item, Scored, read_items
from prfl.utils import rng
from prfl.utils.console import messages
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write
from prfl.utils.pictures import SUFFIXES as PICTURES
from prfl.utils.reading import disk_refuses, printable, unreadable
from prfl.utils.video_size import VideoSize

CLIP = ("frames", "height", "width", "fps")
SECONDS = 10.0  # between two writings of the table


def score_files(
    inputs: Sequence[str],
    head: str,
    *,
    prompt: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    sigmas: Sequence[float] = (0.0,),
    noise_draws: int = 1,
    seed: int = 0,
    clip: Mapping[str, Any] | None = None,
    out: Path | None = None,
    follow_links: bool = False,
    ranking: Ranking | None = None,
) -> None:
    """Score every input and write the table to ``out`` (.csv or .json), or as CSV to the standard output.

    inputs: videos, safetensors of latents, folders of them, patterns, or manifests (.jsonl): see ``read_items``.
    head: a saved reward.  model: the video model that it reads; by default the one of its run, or the hub model that it
    names.  follow_links: a manifest's links may lead out of its folder.
    clip: frames, height, width and fps at which videos are read, where not as the reward was trained.
    A file that cannot be read does not stop the others; PrflError names all of them at the end.  Scores are written as
    they come: whatever ends the command leaves a whole table of the files before.
    ranking: order the videos of each prompt at the end, in place of the table on the standard output.
    """
    check_options(out, sigmas, noise_draws, clip or {})
    items = read_items(inputs, prompt, follow_links)

    # The reward, on the model that it reads.
    backbone = find_backbone(head, read_config(head), model, dtype, device)
    reward = load_reward(head, backbone)
    if reward.space == "pixel" and any(sigmas):
        messages.say("a pixel reward is not noise-aware: above sigma 0 it scores the decoded clean prediction")
    scorer = Scorer(backbone, reward, build_latents_scorer(reward, backbone), noise_draws, seed)
    sized = takes_frames(backbone) or any(item.file.suffix != LATENTS for item in items)
    shape = clip_of(reward.card, clip or {}) if sized else {}

    # The prompts, once each.
    prompts = list(dict.fromkeys(item.prompt for item in items))
    for text in token_warnings(prompts, "the prompts", backbone, token_ids(backbone, prompts)):
        messages.warn(text)
    conditions: dict[Ask, Condition] = {}
    failed: dict[Item, str] = {}
    for item in items:
        try:
            ask = ask_of(backbone, item.file, item.prompt, shape)
            if ask not in conditions:
                conditions[ask] = backbone.condition([ask]).to("cpu")
        except PrflError as error:
            failed[item] = f"{error.where}: {error.one_line}"
    backbone.text.free()

    facts = {"reward": head, "model": backbone.facts.model_id, "noise_draws": noise_draws, "seed": seed, "clip": shape}
    with torch.no_grad(), ScoreTable(out, facts, prints=ranking is None) as table:
        for item in track(items, "scoring", console=messages, transient=True, disable=not messages.is_terminal):
            if item in failed:
                continue
            try:
                latents = read_latents(item.file, backbone, shape)
            except PrflError as error:
                failed[item] = f"{error.where}: {error.one_line}"
                continue
            condition = conditions[ask_of(backbone, item.file, item.prompt, shape)].to(backbone.facts.device)
            table.add(scorer.rows(item, latents, condition, sigmas))

    if ranking and table.rows:
        ranking.show(table.rows, reward.normalisation.unit, shape)
    if failed:
        what = f"{len(failed)} of {len(items)} files were not scored"
        raise PrflError(
            "\n  ".join([what, *failed.values()]),
            where="prfl score",
            fix="mend or leave out these files; the others are scored",
        )


def check_options(out: Path | None, sigmas: Sequence[float], noise_draws: int, clip: Mapping[str, Any]) -> None:
    """Raise PrflError for an option that no score can be computed with."""
    if out is not None and out.suffix not in (".csv", ".json"):
        raise PrflError(f"'{out.suffix}' is not a format of scores", where=f"--out {out}", fix="use .csv or .json")
    for sigma in sigmas:
        if not 0 <= sigma <= 1:
            raise PrflError(f"{sigma:g} is no noise level", where="--sigmas", fix="0 is clean, 1 is noise: 0,0.5,0.9")
    if noise_draws < 1:
        raise PrflError("there is no mean over no draws", where="--draws", fix="1 or more")
    for name, value in clip.items():
        if value is not None and not 0 < value < math.inf:
            fix = f"{'a number above 0' if name == 'fps' else '1 or more'}; without --{name}, as the reward was trained"
            raise PrflError(f"no clip has {name} {value:g}", where=f"--{name}", fix=fix)


@dataclass(frozen=True)
class Scorer:
    """Normalised scores of latents at chosen noise levels.  logits: of noisy latents, by the reward."""

    backbone: Backbone
    reward: TrainableReward
    logits: LatentsScorer
    noise_draws: int
    seed: int

    def at(self, latents: Float[Tensor, "b c t h w"], sigma: float, condition: Condition) -> dict[str, Tensor]:
        """Score latents at one noise level: by dimension, the mean over the noise draws for each sample."""
        level = torch.full((len(latents),), sigma, device=self.backbone.facts.device)
        means: dict[str, Tensor] = {}
        count = self.noise_draws if sigma > 0 else 1
        for draw in range(count):  # the same noise for every file of one size, so that their scores compare
            noise = rng.normal(latents.shape[1:], self.seed, "score", draw, [0]).to(latents)
            noisy = add_noise(latents, noise, level) if sigma > 0 else latents
            scores = self.reward.normalisation.apply(self.logits(noisy, level, condition[[0] * len(latents)]))
            for name, values in scores.items():
                means[name] = means.get(name, 0) + values.float().cpu() / count
        return means

    def rows(
        self, item: Item, latents: Float[Tensor, "b c t h w"], condition: Condition, sigmas: Sequence[float]
    ) -> list[Scored]:
        """Score a file at every noise level, one row for each of its samples."""
        rows = []
        for sigma in sigmas:
            scores = self.at(latents, sigma, condition)
            for number in range(len(latents)):
                rounded = {name: round(float(values[number]), 6) for name, values in scores.items()}
                rows.append(Scored(printable(item.file), number, item.prompt, sigma, rounded))
        return rows


def find_backbone(
    head: str, saved: Mapping[str, Any], model: str | None, dtype: str | None, device: Literal["auto", "cpu", "cuda"]
) -> Backbone:
    """Load ``model``, or the one of the run that the reward lies in, or the hub model that the reward names.

    saved: the reward's config.  Raises PrflError where none of them is to be had.
    """
    run = Path(head).resolve().parent / "config.yaml"
    named = saved.get("backbone", {})
    if model is None and run.is_file():
        config = load_config(run)
        changes: dict[str, Any] = {"adapter": None, "device": device, "compile": False}
        backbone = config.backbone.model_copy(update=changes | ({"dtype": dtype} if dtype else {}))
        return build_backbone(config.model_copy(update={"backbone": backbone}))
    if model is None and not is_hub_id(named.get("model_id")):
        trained_on = f"it was trained on {named['model_id']}" if named else "its card names none"
        raise PrflError(
            f"no video model is given, and {trained_on}", where=head, fix="--model FOLDER or --model owner/name"
        )
    source, revision = (named["model_id"], named.get("revision")) if model is None else (model, None)
    chosen_device = choose_device(BackboneConfig(model=source, device=device))
    return load_backbone(source, getattr(torch, dtype or "float32"), chosen_device, revision)


def takes_frames(backbone: Backbone) -> bool:
    return "image" in backbone.facts.takes


def ask_of(backbone: Backbone, file: Path, prompt: str, clip: Mapping[str, Any]) -> Ask:
    """Make what a file is scored for: its prompt, and where the model takes one a first frame, its own.

    Of latents it is the picture beside them.  Raises PrflError where there is none.
    """
    if not takes_frames(backbone):
        return Ask(prompt)
    frame = file if file.suffix != LATENTS else picture_beside(file)
    return Ask(prompt, frame, VideoSize(**clip))


def picture_beside(file: Path) -> Path:
    """Find the picture that latents begin with: a.png beside a.safetensors, or in the cache that they lie in."""
    places = [file.with_suffix(suffix) for suffix in PICTURES] + [file.parent.parent / "frames" / f"{file.stem}.png"]
    there = [path for path in places if path.is_file()]
    if not there:
        what = "an image-to-video model needs the first frame, and latents have none"
        raise PrflError(what, where=str(file), fix=f"put it beside them as {file.stem}.png, or give the video")
    return there[0]


def clip_of(card: RewardCard, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return how videos are read: as asked, or as the reward was trained; warns outside of its range.

    Raises PrflError where neither says it.
    """
    clip: dict[str, Any] = {}
    for name in CLIP:
        span = getattr(card, name)  # the least and the most that the reward was trained with
        if span is None and asked.get(name) is None:
            what = f"the reward's card does not say at which {name} it was trained"
            raise PrflError(what, where="prfl score", fix=f"give --{name}")
        value = asked.get(name)
        clip[name] = span[1] if value is None else value
        if span is not None and not span[0] <= clip[name] <= span[1]:
            trained = f"{span[0]:g} to {span[1]:g}" if span[0] != span[1] else f"{span[0]:g}"
            messages.warn(f"the reward was trained with {name} {trained}, and scores {clip[name]:g}")
    return clip


@torch.no_grad()
def read_latents(file: Path, backbone: Backbone, clip: Mapping[str, Any]) -> Float[Tensor, "b c t h w"]:
    """Read a file of latents, or a video, which is encoded, onto the backbone's device.

    Raises PrflError naming the file.
    """
    if file.suffix != LATENTS:
        pixels = read_video(file, VideoSize(**clip))[None]
        latents = backbone.encode(pixels.to(backbone.facts.device)).float()
    else:
        stored = load_latents(file)
        check_latents(stored, backbone.facts, where=str(file))
        latents = (stored if stored.ndim == 5 else stored[None]).to(backbone.facts.device, torch.float32)

    if not latents.isfinite().all():
        raise PrflError("its latents are not finite", where=str(file), fix="encode the video again, in float32")
    return latents


def load_latents(file: Path) -> Tensor:
    """Load the tensor ``latents`` of a safetensors file, or the only one.

    It should be (c, t, h, w) as in the cache, or with a batch in front; normalised as the backbone's ``encode`` gives
    them.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            name = "latents" if "latents" in names else names[0] if len(names) == 1 else None
            latents = opened.get_tensor(name) if name else None
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and disk_refuses(file, error):
            raise unreadable(file, error) from error
        what, fix = f"is not a readable safetensors file: {error}", "write it again with safetensors"
        raise PrflError(what, where=str(file), fix=fix) from error

    if latents is None:
        shown = ", ".join(names[:5]) or "none"
        raise PrflError(f"has no tensor 'latents'; it has {shown}", where=str(file), fix="save them under that name")
    return latents


class ScoreTable:
    """The scores, written as they come.  CSV: one line a sample and noise level, one column a dimension.  JSON: the
    facts, then the same rows.  To a file, which is whole whenever somebody looks; None is the standard output.
    prints: whether it writes to the standard output.
    """

    def __init__(self, out: Path | None, facts: Mapping[str, object], prints: bool = True) -> None:
        self.out, self.facts, self.prints = out, facts, prints
        self.rows: list[Scored] = []
        self.written, self.at = 0, -SECONDS

    def __enter__(self) -> ScoreTable:
        return self

    def add(self, rows: Sequence[Scored]) -> None:
        if not rows:
            return
        if self.out is None and self.prints:
            sys.stdout.write(csv_text(rows, header=not self.rows))
            sys.stdout.flush()
        self.rows += rows
        if self.out and time.monotonic() >= self.at + SECONDS:
            self.write(self.out)

    def write(self, out: Path) -> None:
        """Write the whole table again, so that there is never a half row; seldom enough to cost nothing."""
        if out.suffix == ".json":
            listed = [vars(row) for row in self.rows]
            text = json.dumps({**self.facts, "rows": listed}, indent=1, ensure_ascii=False) + "\n"
        else:
            text = csv_text(self.rows, header=True)
        with atomic_write(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self.written, self.at = len(self.rows), time.monotonic()

    def __exit__(self, *_: object) -> None:
        if self.out and self.rows:
            if self.written < len(self.rows):
                self.write(self.out)
            messages.say(f"{len(self.rows)} scores: {printable(self.out)}")


def csv_text(rows: Sequence[Scored], header: bool) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(["file", "sample", "prompt", "sigma", *rows[0].scores])
    for row in rows:
        writer.writerow([row.file, row.sample, row.prompt, f"{row.sigma:g}", *row.scores.values()])
    return text.getvalue()
