"""Values of their own for the two networks of a model that take turns along the chain, as Wan 2.2 A14B's do."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prfl.config.section import MAY_CHANGE, Section


class ScaleOfEach(Section):
    high: float = Field(ge=1, description="Of the expert for high noise.")
    low: float = Field(ge=1, description="Of the expert for low noise.")


class RateOfEach(Section):
    high: float = Field(gt=0, description="Of the expert for high noise.")
    low: float = Field(gt=0, description="Of the expert for low noise.")


GuidanceScale = Annotated[float, Field(ge=1)] | ScaleOfEach
Rate = Annotated[float, Field(gt=0)] | RateOfEach


class ExpertsConfig(Section):
    """``backbone.experts``: of a model of two networks."""

    train: list[Literal["high", "low"]] = Field(
        default=["high", "low"], min_length=1, description="Which of them the policy trains."
    )
    resident: Literal["both", "one"] = Field(
        default="both",
        description="one: their frozen weights wait in host memory, and on the GPU are those of the expert that "
        "computes; a swap copies them there, never back.",
        json_schema_extra=MAY_CHANGE,
    )


def guided(scale: float | ScaleOfEach) -> bool:
    """Whether guidance does something: at a scale of 1 it does not."""
    return scale != 1 if isinstance(scale, float | int) else (scale.high, scale.low) != (1, 1)


def text_of(value: float | ScaleOfEach | RateOfEach) -> str:
    """``4 (high), 3 (low)``, or the one number."""
    if isinstance(value, float | int):
        return f"{value:g}"
    return f"{value.high:g} (high), {value.low:g} (low)"
