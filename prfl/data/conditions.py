"""Conditions of prompts that are encoded once, before the training, and then looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

from prfl.backbone import Ask, Backbone, Condition
from prfl.backbone.condition import as_asks, with_unconditional
from prfl.backbone.network import on_host
from prfl.data.buckets import Clip, ClipSizes, Rows
from prfl.data.cache import LatentCache
from prfl.utils.video_size import VideoSize


def remember(backbone: Backbone, prompts: Iterable[str], progress: Callable[[list[Ask]], Iterable[Ask]] = iter) -> None:
    """Encode these prompts now, keep their conditions on the host, and free the text encoder (10.6 GiB in Wan 2.1).

    Each prompt is encoded alone: in a batch, its last bits would depend on the other prompts.
    """
    conditions = backbone.text.known
    new = [ask for ask in dict.fromkeys(as_asks(prompts)) if ask not in conditions]
    with on_host(backbone) if new else nullcontext():
        for ask in progress(new) if new else ():
            conditions[ask] = backbone.condition([ask]).to("cpu")
        backbone.text.free()


def recall(backbone: Backbone, conditions: Mapping[str, Condition]) -> None:
    """Take over conditions that were encoded before, by prompt, as if ``remember`` had encoded them."""
    asks = as_asks(conditions)
    backbone.text.known.update({ask: conditions[ask].to("cpu") for ask in asks})


def asks_of(
    rows: Rows, sizes: ClipSizes, caches: Mapping[VideoSize, LatentCache], entries: Mapping[Clip, Path]
) -> dict[VideoSize, list[Ask]]:
    """List what the rows' clips are conditioned on, and the unconditional asks, by the size whose cache holds them.

    entries: the latents' file of each clip; clips without one are left out.  Where the model takes no first frame, a
    condition depends on the prompt alone, and the largest size's cache holds them all.
    """
    if not caches[sizes.largest].takes_image:
        return {sizes.largest: with_unconditional(["", *(row.prompt for row in rows)])}
    asks: dict[VideoSize, list[str]] = {size: [] for size in sizes.sizes}
    for row, clips in zip(rows, sizes.clips(rows), strict=True):
        for clip in clips:
            if clip in entries:
                asks[clip[1]].append(caches[clip[1]].ask(row.prompt, entries[clip]))
    return {size: with_unconditional(of_size) for size, of_size in asks.items()}
