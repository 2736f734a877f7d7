"""The estimates as rich tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from prfl.backbone import Backbone
from prfl.backbone.network import predictors
from prfl.config.schema import Config
from prfl.estimate.cost import Cost, total_work
from prfl.estimate.fill import SHARE
from prfl.estimate.fitting import Fit
from prfl.estimate.memory import Memory
from prfl.estimate.units import GIB, gib
from prfl.estimate.work import CARD_SIZES, CardSize
from prfl.factory.backbone import device_kind


def size_table(config: Config, model: Backbone, trainable: int) -> Table:
    """Tabulate the run in numbers: tokens, parameters, steps."""
    data, training = config.data, config.training
    latent = model.latent_shape(data.frames, data.height, data.width)
    channels, *grid = latent
    networks = predictors(model).values()
    base = sum(p.numel() for network in networks for n, p in network.named_parameters() if ".lora_" not in n)
    table = Table("the run", "", title_justify="left")
    table.add_row("video", f"{data.frames} frames of {data.height} x {data.width}")
    for size in data.sizes[1:]:
        rate = f" at {size.fps:g} fps" if size.fps != data.fps else ""
        table.add_row("clips too of", f"{size.frames} frames of {size.height} x {size.width}{rate}")
    table.add_row("latents", f"{channels} x {' x '.join(map(str, grid))} (channels, time, height, width)")
    table.add_row("tokens of the transformer", f"{model.facts.tokens(latent):,}")
    table.add_row("parameters of the transformer", f"{base:,} in {model.facts.num_blocks} blocks")
    table.add_row("trainable parameters", f"{trainable:,}")
    parts = f" in {training.accumulation} parts" if training.accumulation > 1 else ""
    table.add_row("optimizer steps", f"{training.steps:,} with batches of {training.batch}{parts}")
    return table


HOW = (
    "Hours are calculated from counted arithmetic and traffic, nothing was timed: from the faster card, at the rates "
    "that public measurements reach, to the slower one at half of them. Filling the cache is not in them."
)


def cost_table(config: Config, costs: Sequence[Cost], card: CardSize | None) -> Table:
    """Tabulate the network evaluations by kind, and their hours on one such card; None: no hours are known."""
    table = Table("cost: network evaluations, of one sample each", title_justify="left", caption=HOW if card else None)
    table.caption_justify = "left"
    table.add_column("per step, mean", justify="right")
    table.add_column("in all", justify="right")
    in_float32 = config.backbone.dtype == "float32"
    if card:
        table.add_column(f"hours, one {card.names}", justify="right")
    for cost in costs:
        hours = [hours_text(card.hours(cost.work, in_float32)) if cost.work else "in the gradients'"] if card else []
        table.add_row(cost.count.name, f"{cost.count.per_step:,.1f}", f"{cost.count.total:,}", *hours)
    if card:
        table.add_section()
        table.add_row("the whole run", "", "", hours_text(card.hours(total_work(costs), in_float32)), style="bold")
    return table


def hours_text(hours: tuple[float, float]) -> str:
    low, high = (f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in hours)
    return f"{low} to {high}"


def smallest_card(peak: int) -> CardSize:
    """The smallest cards that have room for this peak; the largest where none has."""
    sizes = list(CARD_SIZES.values())
    return next((size for size in sizes if peak <= SHARE * size.gib * GIB), sizes[-1])


def fit_table(result: Fit) -> Table:
    """Tabulate whether a run fits a card, and what to change, in which order, until it does."""
    size, room = result.card, gib(result.room)
    table = Table(f"on {size.gigabytes} GB ({size.names}), of which a run may take {room}", title_justify="left")
    table.add_column("peak", justify="right")
    table.add_column("")
    table.add_row("as it is", gib(result.peak), "fits" if result.peak <= result.room else "does not fit")
    for number, change in enumerate(result.changes, start=1):
        notes = [change.note, "a new run" if change.new_run else "", "fits" if change.peak <= result.room else ""]
        table.add_row(f"{number}. {change.overrides}", gib(change.peak), "; ".join(filter(None, notes)))
    if not result.fits:
        always = gib(result.after.always)
        why = f"what no phase frees takes {always}" if result.after.always > result.room else "nothing else saves more"
        table.add_row("does not fit", "", f"{why}: take a larger card or a smaller model", style="bold")
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
