"""The estimates as rich tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from prfl.backbone import Backbone
from prfl.config.schema import Config
from prfl.estimate.memory import Memory
from prfl.estimate.nfe import NfeCount
from prfl.factory.backbone import device_kind

GIB = 2**30


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def size_table(config: Config, model: Backbone, trainable: int) -> Table:
    """Tabulate the run in numbers: tokens, parameters, steps."""
    data, training = config.data, config.training
    channels, *grid = model.latent_shape(data.frames, data.height, data.width)
    tokens = 1
    for size, patch in zip(grid, model.patch_size, strict=True):
        tokens *= size // patch
    base = sum(p.numel() for n, p in model.transformer.named_parameters() if ".lora_" not in n)
    table = Table("the run", "", title_justify="left")
    table.add_row("video", f"{data.frames} frames of {data.height} x {data.width}")
    table.add_row("latents", f"{channels} x {' x '.join(map(str, grid))} (channels, time, height, width)")
    table.add_row("tokens of the transformer", f"{tokens:,}")
    table.add_row("parameters of the transformer", f"{base:,} in {model.num_blocks} blocks")
    table.add_row("trainable parameters", f"{trainable:,}")
    parts = f" in {training.accumulation} parts" if training.accumulation > 1 else ""
    table.add_row("optimizer steps", f"{training.steps:,} with batches of {training.batch}{parts}")
    return table


def nfe_table(counts: Sequence[NfeCount]) -> Table:
    """Tabulate the network evaluations by kind."""
    table = Table("network evaluations, of one sample each", title_justify="left")
    table.add_column("per step, mean", justify="right")
    table.add_column("in all", justify="right")
    for count in counts:
        table.add_row(count.name, f"{count.per_step:,.1f}", f"{count.total:,}")
    return table


def memory_table(config: Config, memory: Memory) -> Table:
    """Tabulate the predicted memory by part.

    Parts that are alive all the time add up; of the phases, which come one after another, the largest counts.
    """
    table = Table(f"predicted memory ({device_kind(config)})", title_justify="left")
    table.add_column("bytes", justify="right")
    table.add_column("of it saved for backward", justify="right")
    for part in memory.fixed:
        table.add_row(part.name, gib(part.bytes), "")
    table.add_section()
    table.add_row("one after another, above what is always alive:", "", "", style="dim")
    for phase in memory.phases:
        mark = " (nothing else is there yet)" if phase.alone else ""
        mark += " (the largest)" if phase is memory.largest else ""
        table.add_row(f"{phase.name}{mark}", gib(phase.bytes), gib(phase.saved) if phase.saved else "")
    table.add_section()
    table.add_row("peak: all that is always alive, and the largest phase", gib(memory.peak), "", style="bold")
    if memory.host:
        table.add_row("beside it, in host memory: what waits there", gib(memory.host), "")
    return table
