"""The results of a run: one sentence of verdict, the headline in large numbers, and the table of all scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prfl.config.sections.evaluation import FEWEST_PROMPTS
from prfl.evaluation import hacking
from prfl.evaluation.metrics import Interval
from prfl.evaluation.page.compared import Results
from prfl.evaluation.page.html import breakable, cell, is_clear, quiet, section, table
from prfl.evaluation.page.terms import meaning
from prfl.utils.text import html_text

# The first of these that was measured is the headline, with what it is called.
HEADLINES = {
    "judge/all": "samples right in everything, by the judge",
    "held_out/total": "the reward that nothing is trained on",
    "reward/total": "the trained reward",
}
GROUPS = ("judge/", "measured/", "held_out/", "reward/")  # then the rest
TRAINED_ON = "reward/total"
DETAIL = "95 % interval over prompts"


def results_section(results: Results, heading: str) -> str:
    """Show the scores; with two generators their difference, from the same noise, comes first."""
    content, names = results.content, results.names
    key = headline(results)
    count = f"{content['samples']} samples of {content['prompts']} prompts"
    drawn = f" ({results.drawn})" if results.drawn else ""
    same = "; the same noise for all, so that differences are paired sample by sample" if len(names) > 1 else ""
    note = f"{count}{drawn}{same}. In brackets: {DETAIL}; a difference in colour is clear of 0."
    return section(heading, _verdict(results, key), _tiles(results, key), quiet(note), _scores(results))


def headline(results: Results) -> str | None:
    """Choose the measure that says most about the videos: nothing trained on it, if there is such a one."""
    measured = next(iter(results.content["outcomes"].values()))["summary"]
    return next((key for key in HEADLINES if key in measured), None)


# --- the verdict ------------------------------------------------------------------------------------------------------


def _verdict(results: Results, key: str | None) -> str:
    text = verdict_sentence(results, key)
    return f"<p class=verdict>{html_text(text)}</p>" if text else ""


def verdict_sentence(results: Results, key: str | None) -> str:
    """Say in one sentence what came of it; "" where there is no policy beside its base."""
    outcomes = results.content["outcomes"]
    if key is None or not {"base", "policy"} <= outcomes.keys():
        return ""
    change = Interval(**outcomes["policy"]["difference"][key])
    before, after = (Interval(**outcomes[name]["summary"][key]).value for name in ("base", "policy"))
    few = results.content["prompts"] < FEWEST_PROMPTS
    clear = is_clear(change) and not few

    # Gain or loss, in the measure's own terms.
    kind = ("A gain" if change.value > 0 else "A loss") if clear else "No clear change"
    moved = f"{HEADLINES[key]}: {before:.3f} before, {after:.3f} after, {change.value:+.3f} ({_range(change)})"
    reason = f"; {results.content['prompts']} prompts are too few to tell" if few else ""

    # What a gain in the trained reward alone is worth, what fell meanwhile, and what the judge measured.
    alone = "; nothing else was measured that says whether the videos are better, so look at them"
    alarms = _alarms(results)
    fell = f"; but {' and '.join(alarms)} fell, as when a reward is hacked" if alarms else ""
    return f"{kind} in {moved}{reason}{alone if key == TRAINED_ON else ''}{fell}{_measured(results)}."


def _measured(results: Results) -> str:
    """Name what the judge measured in the videos and is clearly not as the base's: a size, say."""
    outcome = results.content["outcomes"]["policy"]
    changes = {
        name: Interval(**fields) for name, fields in outcome["difference"].items() if name.startswith("measured/")
    }
    texts = [
        f"{name.removeprefix('measured/')} is {outcome['summary'][name]['value']:.2f}, {change.value:+.2f}"
        for name, change in changes.items()
        if is_clear(change)
    ]
    return f"; meanwhile {' and '.join(texts)}" if texts else ""


def _alarms(results: Results) -> list[str]:
    """Name what is clearly lower than the base's while the trained reward is clearly higher."""
    history = [(0, results.outcome("base")), (1, results.outcome("policy"))]
    return [alarm.measure for alarm in hacking.find_alarms(history)]


def _range(interval: Interval, sign: str = "+") -> str:
    return f"{interval.low:{sign}.3f} to {interval.high:{sign}.3f}"


# --- large numbers ----------------------------------------------------------------------------------------------------


def _tiles(results: Results, key: str | None) -> str:
    """Show the headline of each generator, and the difference, each with what was counted."""
    if key is None:
        return ""
    outcomes = results.content["outcomes"]
    first, *others = outcomes
    tiles = ""
    for name, outcome in outcomes.items():
        if key in outcome["summary"]:
            value = Interval(**outcome["summary"][key])
            tiles += _tile(f"{value.value:.3f}", name, _counted(results, name, key), _range(value, ""))
    for name in others:
        if key in outcomes[name]["difference"]:
            change = Interval(**outcomes[name]["difference"][key])
            tiles += _tile(
                f"{change.value:+.3f}", f"{name} − {first}", "the same noise, sample by sample", _range(change)
            )
    return f"<p class=quiet>{html_text(HEADLINES[key])}:</p><div class=tiles>{tiles}</div>"


def _tile(number: str, name: str, counted: str, interval: str) -> str:
    lines = f"<small>{html_text(counted)}</small><small>95 %: {html_text(interval)}</small>"
    return f"<div><b>{html_text(number)}</b><span>{html_text(name)}</span>{lines}</div>"


def _counted(results: Results, name: str, key: str) -> str:
    """Say what the number of a tile is of: so many of so many, or the mean of so many."""
    values = [row[name][key] for row in results.content["rows"] if key in row[name]]
    if values and set(values) <= {0.0, 1.0}:
        return f"{round(sum(values))} of {len(values)} samples"
    return f"mean of {len(values)} samples"


# --- all scores -------------------------------------------------------------------------------------------------------


def _place(key: str) -> tuple[bool, int]:
    """Return where a score stands in the table: headlines first, then by group."""
    group = next((number for number, name in enumerate(GROUPS) if key.startswith(name)), len(GROUPS))
    return key not in HEADLINES, group


def _scores(results: Results) -> str:
    """Show the table: the differences first, which a phone has room for, then each generator."""
    outcomes: Mapping[str, Any] = results.content["outcomes"]
    first, *others = outcomes
    head = ["score", *(f"{name} − {first}" for name in others), *outcomes]
    body = []
    for key in sorted(outcomes[first]["summary"], key=_place):
        named = f"{breakable(key)}<small>{html_text(meaning(key))}</small>"
        differences = [cell(outcomes[name]["difference"].get(key), signed=True) for name in others]
        body.append([named, *differences, *(cell(outcome["summary"].get(key)) for outcome in outcomes.values())])
    return table(head, body, "all scores")
