"""Whether a run learns anything: looked at after the first step, at every save and at the end.

A run can go through without an error and train nothing, or something else than it says: an optimizer over copies, a
rate that is lost in rounding, a base that drifts, a hinge that every sample has met.  What is looked at here is only
read, so a run with these looks and one without are the same bit for bit; and after a resumption it goes on from what
metrics.jsonl has of the steps before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

from torch import Tensor, nn

from prfl.backbone.fingerprint import sampled
from prfl.config.sections.experts import RateOfEach, text_of
from prfl.utils.errors import GuardError

SAMPLED = 64  # values of each tensor that are compared
STILL = 1e-12  # a trained weight that moved by less has not moved
WILD = 1.0  # a trained weight that moves by more in the first step: no rate is meant to be so large
VANISHED = 1e-12  # root mean square of a gradient: AdamW's epsilon, 1e-8, leaves a ten-thousandth of the step or less
QUIET_SAID, QUIET_ENDS = 10, 100  # steps on end without a gradient: a hinge may be met now and then
SMALLEST_WINDOW, LARGEST_WINDOW = 8, 100  # rollouts at the start and at the end of a run that are compared
CLEARLY = 4.0  # standard errors of their difference


@dataclass(frozen=True)
class Watched:
    """What a trainer does not see by itself.

    weights: all of the model's; those that are not trained must stay as they are.
    check_effect: raises PrflError where what was trained, up to this step, makes no difference; None: not known.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    check_effect: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Reached:
    """What one step reached: ``value`` should rise.  rollout: whose samples it saw.  node: where it was read."""

    rollout: int
    node: float
    value: float


@dataclass
class Learning:
    """Follows one run.  parameters: what is trained.  warn: where a warning goes.  rate: the peak learning rate."""

    parameters: Mapping[str, nn.Parameter]
    watched: Watched
    warn: Callable[[str], None]
    rate: float | RateOfEach
    quiet: int = 0  # steps on end without a gradient
    lossless: int = 0  # steps on end without a loss
    pulled: int = 0  # steps with a gradient since the last look
    reached: list[Reached] = field(default_factory=list)
    told_of_fall: int = 0  # the step up to which a fall was warned of

    def __post_init__(self) -> None:
        trained = {id(parameter) for parameter in self.parameters.values()}
        self.others = {name: value for name, value in self.watched.weights.items() if id(value) not in trained}
        self.still = sampled(self.others, SAMPLED)
        self.last = sampled(self.parameters, SAMPLED)
        self.size = sum(parameter.numel() for parameter in self.parameters.values())
        self.sign, self.goal = 1, "trained reward"

    def recall(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Count the steps before a resumption, as metrics.jsonl has them."""
        for record in records:
            if "gradient_norm" in record:
                self.count(record)

    def count(self, metrics: Mapping[str, Any]) -> None:
        vanished = metrics["gradient_norm"] / math.sqrt(self.size) < VANISHED
        self.quiet = self.quiet + 1 if vanished else 0
        self.pulled += not vanished
        self.lossless = self.lossless + 1 if metrics.get("loss") == 0 else 0
        if "reward" not in metrics:
            self.sign, self.goal = -1, "loss"
        value = self.sign * metrics.get("reward", metrics.get("loss", 0.0))
        before = self.reached[-1].rollout if self.reached else 0
        rollout = before if metrics.get("rollout_age") else before + 1
        self.reached.append(Reached(rollout, metrics.get("node", 0.0), value))

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises PrflError where the first step moved nothing."""
        self.count(metrics)
        met = "; the loss is zero: every sample meets the hinge's target" if self.lossless >= QUIET_SAID else ""
        if self.quiet == QUIET_SAID:
            end = f"{QUIET_ENDS} steps on end stop the run"
            self.warn(f"no gradient in the {QUIET_SAID} steps up to step {step}{met}; {end}")
        elif self.lossless == QUIET_SAID and not self.quiet:
            self.warn(f"no loss in the {QUIET_SAID} steps up to step {step}: what is trained for is reached")
        if step == 1:
            self.look(step, metrics["gradient_norm"])

    @property
    def stuck(self) -> bool:
        return self.quiet >= QUIET_ENDS

    def check_stuck(self, step: int, saved: str) -> None:
        """Raises PrflError where there has been no gradient for too long."""
        if not self.stuck:
            return
        met = self.lossless >= self.quiet
        why = "the loss is zero, every sample meets the hinge's target" if met else "the reward is flat there"
        another = "a higher reward.target, or reward.shape: linear" if met else "a reward that the policy can change"
        raise GuardError(
            f"no gradient in the {self.quiet} steps up to step {step}: {why}",
            where="objective",
            fix=f"{saved} is what was reached, and training.steps={step} makes it the end of this run; another run "
            f"goes further with {another}",
        )

    def look(self, step: int, first: float | None = None) -> None:
        """Raise PrflError where nothing that is trained has moved since the last look, or anything else has.

        first: the norm of the gradient in the first step.
        """
        now = sampled(self.parameters, SAMPLED)
        moved = max(float((now[name] - self.last[name]).abs().max()) for name in now)
        if moved <= STILL and (self.pulled or first is not None):
            norm = "" if first is None else f", the gradient's norm {first:.3g}"
            raise GuardError(
                f"up to step {step} none of the {len(now)} trained tensors has moved since the last look at them "
                f"(the learning rate is {text_of(self.rate)}{norm})",
                where="training.learning_rate",
                fix="raise it, or the adapter's alpha, or the reward's scale: so small a rate or gradient is lost",
            )
        if first is not None and moved > WILD:
            self.warn(f"the first step moved a weight by {moved:.3g}: lower training.learning_rate")
        self.last, self.pulled = now, 0
        self.check_others(step)

    def check_others(self, step: int) -> None:
        now = sampled(self.others, SAMPLED)
        changed = [name for name in now if not same(now[name], self.still[name])]
        if changed:
            raise GuardError(
                f"up to step {step} {len(changed)} tensors changed that are not trained, the first is {changed[0]}",
                where="backbone.model",
                fix="let nothing but the trained parameters be written to: the reward, and the distance to the base, "
                "are of another model now; resume from a checkpoint before it",
            )

    def at_save(self, step: int) -> None:
        """Raises PrflError where the weights say, or the model's output, that the run does not what it should."""
        if step:  # a signal before the first one: nothing is trained yet
            self.look(step)
            if self.watched.check_effect:
                self.watched.check_effect(step)
            self.warn_of_fall(step)

    def at_end(self, step: int) -> None:
        """Check as at a save, and warn of a fall up to here: at the end of the output it is read."""
        if step and self.watched.check_effect:
            self.watched.check_effect(step)
        if self.told_of_fall != step:
            self.told_of_fall = 0
            self.warn_of_fall(step)

    def warn_of_fall(self, step: int) -> None:
        fall = clear_fall(self.reached)
        if fall and not self.told_of_fall:
            self.told_of_fall = step
            before, after, size = fall
            self.warn(
                f"up to step {step} the {self.goal} got worse: {self.sign * before:.4g} in the first {size} "
                f"rollouts, {self.sign * after:.4g} now; check the sign of reward.weights, and lower "
                f"training.learning_rate ({text_of(self.rate)})"
            )


def same(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors are equal, a NaN being equal to a NaN."""
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


def clear_fall(reached: Sequence[Reached]) -> tuple[float, float, int] | None:
    """Compare the end of a run with its start: None, or, where the end is lower by more than chance explains, a triple.

    The mean at the start, the mean at the end, and the number of rollouts at the start.

    A reward differs much between the nodes at which it is read, so each value counts as its difference to the mean of
    its node; and the steps of one rollout see the same samples, so they count once, by their mean.  The start is looked
    at twice, its first few rollouts and as many as at the end: a policy may be lost early.
    """
    # Each value without the level of its node, then one mean for each rollout.
    level = {node: fmean(values) for node, values in grouped((r.node, r.value) for r in reached).items()}
    overall = fmean(r.value for r in reached) if reached else 0.0
    by_rollout = grouped((r.rollout, overall + r.value - level[r.node]) for r in reached)
    means = [fmean(values) for values in by_rollout.values()]

    window = min(len(means) // 4, LARGEST_WINDOW)
    if window < SMALLEST_WINDOW:
        return None
    last = means[-window:]
    for size in (SMALLEST_WINDOW, window):
        first = means[:size]
        error = math.sqrt(variance(first) / size + variance(last) / window)
        if fmean(first) - fmean(last) > CLEARLY * error:
            return fmean(first), fmean(last), size
    return None


def grouped(pairs: Iterable[tuple[Any, float]]) -> dict[Any, list[float]]:
    groups: dict[Any, list[float]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
