"""The curves of metrics.jsonl: what was measured on held-out prompts apart from the numbers of the steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prfl.evaluation import plots
from prfl.evaluation.page.html import details, plot, quiet, section
from prfl.evaluation.page.terms import meaning
from prfl.utils.metrics_file import HELD_OUT

# Curves of the steps that a person asks for first; the rest follow, folded away.
FIRST = ("reward", "loss", "gradient_norm", "distance")
# And of the rounds: a headline, what a hacked reward lets fall, and how far the policy went.
FIRST_HELD_OUT = tuple(
    f"{HELD_OUT}{name}"
    for name in ("judge/all", "held_out/total", "reward/total", "motion", "diversity", "distance", "accuracy/")
)
NOT_CURVES = ("step", "phase")


def curves_section(records: Sequence[Mapping[str, Any]]) -> str:
    """Show a plot for each metric over steps."""
    names = list(dict.fromkeys(name for record in records for name in record if name not in NOT_CURVES))
    held_out = [name for name in names if name.startswith(HELD_OUT)]
    of_steps = [name for name in names if name not in held_out]
    if not names:
        return ""
    parts = []
    if held_out:
        parts.append("<h3>On held-out prompts</h3>")
        parts.append(_plots(records, held_out, FIRST_HELD_OUT))
    if of_steps:
        parts.append("<h3>In training</h3>")
        parts.append(quiet("Each step's own samples: pale are the steps, the line is their running mean."))
        parts.append(_plots(records, of_steps, FIRST))
    return section("Curves", *parts)


def _plots(records: Sequence[Mapping[str, Any]], names: Sequence[str], first: Sequence[str]) -> str:
    """Show those of ``first`` in its order, the rest folded away; all, where none of them is there."""
    count = Counter(name for record in records for name in record)
    single, names = [name for name in names if count[name] == 1], [name for name in names if count[name] > 1]
    shown = [name for beginning in first for name in names if fits(name, beginning)] or list(names)
    rest = [name for name in names if name not in shown]
    folded = details(f"{len(rest)} more", _grid(records, rest)) if rest else ""
    return _grid(records, shown) + folded + _once(records, single)


def _once(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """List what was measured once: a point is no curve."""
    values = [(name, record["step"], record[name]) for name in names for record in records if name in record]
    return quiet("; ".join(f"{name} {value:.4g} at step {step}" for name, step, value in values)) if values else ""


def fits(name: str, beginning: str) -> bool:
    return name.startswith(beginning) if beginning.endswith("/") else name == beginning


def _grid(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    figures = "".join(plot(plots.curve(records, name), name, meaning(name)) for name in names)
    return f"<div class=plots>{figures}</div>"
