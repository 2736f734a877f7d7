"""What bench/ten_minutes.py brings home: JSON lines of several kinds in one file, read for the report.

{"part", "at", "row", ...}              a figure; with "extra_info" one provider of a case, as pytest-benchmark has it
{"part", "at", "row", "failed": why}    what could not be measured
{"part", "end": "done" | why not, "seconds", "key"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prfl.utils.errors import PrflError

STEP_MODES = "step_modes"


class Seconds(NamedTuple):
    """Of one network evaluation: without a gradient; with one, checkpointed blocks again among it."""

    forward: float
    gradient: float


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a bundle; half a line at the end, of a machine that was taken away, is dropped.

    Of a part that ran twice the last lines are the ones that count: earlier ones of the same row are left out.
    Raises PrflError for a file that is not there or no bundle.
    """
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        fix = "give a file that bench/ten_minutes.py wrote"
        raise PrflError(f"cannot be read: {error.strerror}", where=str(path), fix=fix) from error

    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for number, text in enumerate(filter(None, texts), start=1):
        try:
            line = json.loads(text)
            name = line["part"], line.get("row", "end")
        except (ValueError, TypeError, KeyError) as error:
            if number == len(texts):  # no line break behind it
                break
            fix = "give a file that bench/ten_minutes.py wrote"
            raise PrflError("is no line of such a bundle", where=f"{path}:{number}", fix=fix) from error
        lines.pop(name, None)
        lines[name] = line
    return list(lines.values())


def read_result(file: Path) -> Any:
    """Read a bundle's lines, or what any other result file holds."""
    return read_lines(file) if file.suffix == ".jsonl" else json.loads(file.read_text(encoding="utf-8"))


def case_rows(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return name and extra_info of each provider that was measured."""
    return [(f"{line['part']}::{line['row']}", line["extra_info"]) for line in lines if "extra_info" in line]


def notes(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the device, its ceilings, the tests, what failed and how each part ended: a line each."""
    texts = []
    for line in lines:
        if line.get("row") == "device":
            more = [f"{line['gib']:.0f} GiB"] if "gib" in line else []
            more += [f"{name} {line[name]}" for name in ("cuda", "cudnn", "driver, clocks, power") if line.get(name)]
            texts.append(", ".join([line["machine"], *more]))
        elif line.get("row") == "copy":
            texts.append(f"a copy moves {line['gb_per_s']:.0f} GB/s, read and written")
        elif line.get("row") == "product":
            dtype = line["dtype"].removeprefix("torch.")
            texts.append(f"a matrix product reaches {line['tflops']:.3g} TFLOPS in {dtype}")
        elif line.get("row") == "tests":
            texts += [f"kernels' tests: {line['summary']}", *(f"  {failed}" for failed in line["failed"])]
        elif line.get("row") == "passed":
            texts.append(f"kernels whose tests passed here: {', '.join(line['operations']) or 'none'}")
        elif "summary" in line:
            texts.append(f"{line['row']}: {line['summary']}")
        elif "chosen" in line:
            rate = f"{line['tflops']:.3g} TFLOPS" if "tflops" in line else f"{line['gb_per_s']:.0f} GB/s"
            texts.append(f"{line['row']}: {rate}{' (in use)' * line['chosen']}")
        elif "failed" in line:
            texts.append(f"{line['row']}: {line['failed']}")
        elif "end" in line:
            texts.append(f"part {line['part']}: {line['end']}, {line['seconds']} s")
    return texts + peaks(lines)


def peaks(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compare the allocator's peak of each step and of its phases with what the dry run predicts."""
    texts = []
    for _, info in case_rows(lines):
        predicted, phases = info.get("predicted", {}), []
        for phase, measured in info.get("measured", {}).items():
            if phase in predicted:
                off = f"{predicted[phase] / measured - 1:+.1%}"
                phases.append(f"{phase} {measured / 1e9:.1f} GB, predicted {predicted[phase] / 1e9:.1f} GB ({off})")
        if phases:
            texts.append(f"{info['case']}, {info['provider']}: {'; '.join(phases)}")
    return texts


def call_seconds(path: Path, world: str, mode: str) -> Seconds:
    """Compute the seconds of a forward and of a gradient call from the parts of a step that was measured.

    The step differentiates the chain's middle step, whose edge keeps its graph: it rolls out ``chain // 2`` steps and
    that edge without recomputing it, and ``backward`` holds the blocks again and their backward pass.
    Raises PrflError where the bundle has no such step.
    """
    for _, info in case_rows(read_lines(path)):
        if (info["operation"], info["settings"]["world"]) == (STEP_MODES, world) and info["provider"] == mode:
            parts, chain = info["parts_ms"], info["settings"]["chain"]
            forward = parts["rollout"] / (chain // 2 + 1) / 1e3
            return Seconds(forward, forward + parts["backward"] / 1e3)
    fix = "let `python bench/ten_minutes.py` run its part large-step or small-step there"
    raise PrflError(f"has no step of {world} in the mode {mode!r}", where=str(path), fix=fix)
