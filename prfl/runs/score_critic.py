"""``prfl score --critic``: a vision-language model's answers about finished videos; no video model is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track

from prfl.backbone.condition import Condition, as_asks
from prfl.config.sections.backbone import BackboneConfig
from prfl.data.video import read_video
from prfl.factory.backbone import choose_device
from prfl.factory.critic import critic_folder, find_questions
from prfl.reward.critic import load_critic
from prfl.runs.ranking import Ranking
from prfl.runs.score import CLIP, ScoreTable
from prfl.runs.score_inputs import LATENTS, Scored, read_items
from prfl.utils.console import messages
from prfl.utils.errors import PrflError
from prfl.utils.reading import printable
from prfl.utils.video_size import VideoSize


def score_files(
    inputs: Sequence[str], model: str, *, questions: str | None = None, prompt: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None, device: Literal["auto", "cpu", "cuda"] = "auto",
    clip: Mapping[str, Any], out: Path | None = None, follow_links: bool = False, ranking: Ranking | None = None,
) -> None:  # fmt: skip
    """Score every video by the log-odds of the wanted answers, as ``prfl score`` writes scores.

    model: a critic: a folder, a hub id, or 'shapes'.  questions: a file of them; None asks whether the video fits its
    prompt.  clip: frames, height, width and fps at which videos are read; all of them.
    Raises PrflError, at the end, with every file that could not be read.
    """
    if missing := [name for name in CLIP if clip.get(name) is None]:
        fix = f"give {', '.join(f'--{name}' for name in missing)}, as the videos are to be read"
        raise PrflError("a critic has no size of its own", where="prfl score --critic", fix=fix)
    size = VideoSize(**{name: clip[name] for name in CLIP})
    items = read_items(inputs, prompt, follow_links)
    if latents := [item.file for item in items if item.file.suffix == LATENTS]:
        fix = "give videos; latents are scored by --head"
        raise PrflError("a critic sees no latents", where=str(latents[0]), fix=fix)

    chosen = choose_device(BackboneConfig(model="shapes", device=device))
    critic = load_critic(
        str(critic_folder(model)), find_questions(questions), dtype=dtype or "float32", device=chosen, clip=size,
        prompts=list(dict.fromkeys(item.prompt for item in items)),
    )  # fmt: skip
    failed: list[str] = []
    facts = {"critic": model, "questions": questions, "clip": vars(size)}
    with torch.no_grad(), ScoreTable(out, facts, prints=ranking is None) as table:
        for item in track(items, "asking", console=messages, transient=True, disable=not messages.is_terminal):
            try:
                pixels = read_video(item.file, size)[None].to(chosen)
            except PrflError as error:
                failed.append(f"{error.where}: {error.one_line}")
                continue
            scores = critic(pixels, Condition({}, as_asks([item.prompt])))
            rounded = {name: round(float(values[0]), 6) for name, values in scores.items()}
            table.add([Scored(printable(item.file), 0, item.prompt, 0.0, rounded)])

    if ranking and table.rows:
        ranking.show(table.rows, "log-odds of the wanted answer", vars(size))
    if failed:
        what, fix = f"{len(failed)} of {len(items)} files were not scored", "mend or leave out these files"
        raise PrflError("\n  ".join([what, *failed]), where="prfl score", fix=fix)
