"""Turns named logits into the number that an objective raises, and normalises them before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import ConfigDict, Field
from torch import Tensor

from prfl.utils.errors import PrflError

Scores = dict[str, Float[Tensor, " b"]]
Shape = Literal["sum", "logsigmoid"]


@dataclass(frozen=True)
class Normalisation:
    """Mean and deviation of each dimension's logits on validation samples.

    Raises PrflError for a deviation that is not above zero (it would turn a score round, or divide it by nothing), or
    for a value that is not finite.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    mean: dict[str, float]
    std: dict[str, Annotated[float, Field(gt=0)]]

    def __post_init__(self) -> None:
        for name, value in self.std.items():
            if not (math.isfinite(value) and value > 0 and math.isfinite(self.mean.get(name, math.nan))):
                raise PrflError(
                    f"the scores of {name} cannot be normalised by mean {self.mean.get(name)} and deviation {value}",
                    where="normalisation",
                    fix="calibrate the reward on two or more different samples",
                )

    @property
    def unit(self) -> str:
        """What one of a score is."""
        if set(self.mean.values()) == {0.0} and set(self.std.values()) == {1.0}:
            return "a logit, as the head gives it: no held-out videos have set its mean and deviation"
        return "0 is the average held-out clean video, +1 is one standard deviation better"

    @staticmethod
    def none(dimensions: Sequence[str]) -> Normalisation:
        """Return the normalisation that changes nothing."""
        return Normalisation(dict.fromkeys(dimensions, 0.0), dict.fromkeys(dimensions, 1.0))

    @staticmethod
    def of(logits: Scores) -> Normalisation:
        """Compute mean and deviation of each dimension's logits (n,).

        Raises PrflError for a dimension whose logits are all the same: nothing can be divided by their deviation.
        """
        mean = {name: float(values.double().mean()) for name, values in logits.items()}
        std = {name: float(values.double().std()) if len(values) > 1 else 0.0 for name, values in logits.items()}

        eps = torch.finfo(torch.float32).eps  # what varies by the rounding of a head does not vary
        flat = []
        for name, deviation in std.items():
            largest = float(logits[name].abs().amax()) if deviation else 0.0  # there may be no logit at all
            if not deviation > eps * largest:
                flat.append(name)
        if flat:
            raise PrflError(
                f"the scores of {', '.join(flat)} do not vary on the validation samples",
                fix="calibrate on two or more different samples, with a head that has been trained",
            )
        return Normalisation(mean, std)

    def apply(self, logits: Scores) -> Scores:
        """Normalise logits, each (b,)."""
        return {name: (values - self.mean[name]) / self.std[name] for name, values in logits.items()}


def total(scores: Scores, weights: Mapping[str, float] | None = None, shape: Shape = "sum") -> Float[Tensor, " b"]:
    """Compute the scalar that an objective raises, (b,): a weighted sum over dimensions.

    weights: the dimensions that count, by name; a dimension that is not named does not; None counts every one as 1.
    shape: ``sum`` takes the scores as they are.  ``logsigmoid`` takes raw *logits* and sums log sigmoid(logit): the
    log probability that every label is good, if they are independent.  It flattens once a label is likely good, so
    there is little to gain from pushing a score beyond the head's training data.
    Raises PrflError for a weight on a dimension that the reward does not have.
    """
    weights = dict.fromkeys(scores, 1.0) if weights is None else weights
    unknown = sorted(set(weights) - set(scores))
    if unknown or not weights:
        raise PrflError(
            f"no such reward dimension: {', '.join(unknown)}" if unknown else "no reward dimension has a weight",
            where="reward.weights",
            fix=f"name some of: {', '.join(scores)}",
        )

    shaped = {name: F.logsigmoid(scores[name]) if shape == "logsigmoid" else scores[name] for name in weights}
    return torch.stack([weight * shaped[name] for name, weight in weights.items()]).sum(0)
