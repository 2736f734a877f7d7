"""Config values that may differ between the two networks (experts) of a model like Wan 2.2 A14B: one network predicts
at high noise levels, the other at low ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from prfl.config.section import MAY_CHANGE, Fault, FolderOrFile, Section, place


class ScaleOfEach(Section):
    high: float = Field(ge=1, description="Value for the high-noise expert.")
    low: float = Field(ge=1, description="Value for the low-noise expert.")


class RateOfEach(Section):
    high: float = Field(gt=0, description="Value for the high-noise expert.")
    low: float = Field(gt=0, description="Value for the low-noise expert.")


class LoraOfEach(Section):
    high: FolderOrFile | None = place(default=None, description="The file for the high-noise expert; null is none.")
    low: FolderOrFile | None = place(default=None, description="The file for the low-noise expert; null is none.")


GuidanceScale = Annotated[float, Field(ge=1)] | ScaleOfEach
FirstFrame = Annotated[float, Field(ge=1)] | None
Rate = Annotated[float, Field(gt=0)] | RateOfEach


class ExpertsConfig(Section):
    """``backbone.experts``: how a model of two networks is trained and kept in memory."""

    train: list[Literal["high", "low"]] = Field(
        default=["high", "low"], min_length=1, description="Which of the two experts the policy trains."
    )
    resident: Literal["both", "one"] = Field(
        default="both",
        description="both: the frozen weights of both experts are on the GPU. one: they wait in host "
        "memory, and only those of the expert that computes are on the GPU; a swap copies them "
        "there, never back.",
        json_schema_extra=MAY_CHANGE,
    )


def loras_of(lora: Path | LoraOfEach | None) -> dict[str, Path]:
    """Return the files by expert, ``{"high": FILE, "low": FILE}``; one file for the whole model is ``{"": FILE}``.

    Files that are None are left out, so the result may be empty.
    """
    files = {"high": lora.high, "low": lora.low} if isinstance(lora, LoraOfEach) else {"": lora}
    return {expert: file for expert, file in files.items() if file is not None}


def guided(scale: float | ScaleOfEach) -> bool:
    """Whether guidance has an effect: at a scale of 1 it has none."""
    return scale != 1 if isinstance(scale, float | int) else (scale.high, scale.low) != (1, 1)


def first_frame_faults(key: str, first: float | None, scale: float | ScaleOfEach) -> Iterator[Fault]:
    """Yield the faults of ``first``, the guidance scale of the first frame.  scale: that of the last frame."""
    if first is not None and isinstance(scale, ScaleOfEach):
        yield key, "guidance goes from frame to frame, or has a scale of each expert; give one number as scale"
    elif first is not None and scale == 1:
        yield key, "at scale 1 there is no guidance; give a larger scale, of the last frame, or remove it"


def text_of(value: float | ScaleOfEach | RateOfEach) -> str:
    """Write a value as text: ``4 (high), 3 (low)``, or the one number."""
    if isinstance(value, float | int):
        return f"{value:g}"
    return f"{value.high:g} (high), {value.low:g} (low)"
