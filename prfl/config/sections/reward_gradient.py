"""The ``objective`` sections that train a video model by the gradient of a reward: one class for each method.

A subclass that defines ``name`` as a Literal can be chosen in a config; factory/objective.py names the class that
implements it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from prfl.config.section import Fault, Section, Share, unread
from prfl.config.sections.objective import ObjectiveBase

if TYPE_CHECKING:
    from prfl.config.schema import Config


class SftRegulariserConfig(Section):
    every: int = Field(
        default=1,
        ge=1,
        description="Reward steps for each SFT step: 1 alternates, 4 puts an SFT step before every fourth reward step.",
    )
    weight: float = Field(default=1.0, gt=0, description="Factor of the SFT loss in its own optimizer step.")
    prompt_dropout: float = Field(default=0.1, ge=0, le=1, description="Share of clips trained without their prompt.")


class RewardGradientConfig(ObjectiveBase):
    """What every objective that follows a reward has in common."""

    name: str = Field(description="The method: which steps of the chain get gradient, and from what.")
    frames: Literal["all", "one"] | Annotated[int, Field(ge=1)] = Field(
        default="all",
        description="Latent frames that are decoded for a pixel reward: all, one at random, or a number N: "
        "one from each of N equal parts of the clip.",
    )
    distance_weight: float = Field(default=0.0, ge=0, description="Weight of the velocity's distance to the base.")
    sft: SftRegulariserConfig | None = Field(
        default=None,
        description="SFT on the data section as a regulariser, which keeps the model near its data; null is none.",
    )

    follows_reward = True
    fewest_steps: ClassVar[int] = 1  # smallest rollout.steps that the method allows
    shares_rollout: ClassVar[bool] = False  # whether one rollout can serve several optimizer steps

    @property
    def starts_from_data(self) -> bool:
        """Whether chains start from noised clips of the data."""
        return False

    @property
    def reads_clips(self) -> bool:
        return self.starts_from_data or self.sft is not None

    @property
    def needs_rollout(self) -> bool:
        """Whether any chain is rolled out from noise."""
        return True

    @property
    def scores_frames_alone(self) -> bool:
        """Whether a pixel reward scores each drawn latent frame by itself."""
        return False

    def trains_every_step(self, steps: int) -> bool:
        """Whether all steps of a chain of ``steps`` steps get gradient, so the rollout has no step without one."""
        return False

    def conflicts(self, config: Config) -> Iterator[Fault]:
        if config.reward and config.reward.space == "latent" and self.frames != "all":
            yield "objective.frames", "a latent reward scores all frames; frames is for pixel rewards"
        if config.rollout.steps < self.fewest_steps:
            yield "rollout.steps", f"objective {self.name} needs a chain of two steps or more"


def range_faults(steps_range: tuple[float, float]) -> Iterator[Fault]:
    """Yield the faults of ``steps_range``, a part of the chain given as two shares of its length."""
    low, high = steps_range
    if not 0 <= low < high <= 1:
        yield "objective.steps_range", f"needs 0 <= low < high <= 1, got [{low:g}, {high:g}]"


def handoff_faults(handoff: str, config: Config) -> Iterator[Fault]:
    """Yield the faults of ``handoff``, which says what latent is scored."""
    if handoff == "next" and config.reward and config.reward.space == "pixel":
        yield "objective.handoff", "a pixel reward cannot score a noisy latent; use handoff: clean"


class FromDataConfig(Section):
    """The key ``from_data``, for methods whose chains may start from noised clips."""

    from_data: Share = Field(
        default=0.0,
        description="Share of the optimizer steps whose chains start from noised clips of the data, at the drawn step "
        "of the chain. They need no rollout up to that step.",
    )

    @property
    def starts_from_data(self) -> bool:
        return self.from_data > 0

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        if self.from_data and config.rollout.solver_facts.multistep:
            solver = config.rollout.solver
            yield "rollout.solver", f"objective.from_data starts inside the chain; {solver} needs all before it"
        if self.from_data and config.rollout.gradients_per_rollout > 1:
            what = "objective.from_data: chains from clips need no rollout; take one of the two"
            yield "rollout.gradients_per_rollout", what


class PrflConfig(FromDataConfig, RewardGradientConfig):
    name: Literal["prfl"] = Field(description="One random step of the chain gets the gradient of a latent reward.")
    handoff: Literal["next", "clean"] = Field(
        default="next", description="Score the next latent, or the clean prediction of the step."
    )
    steps_range: tuple[float, float] = Field(
        default=(0.0, 1.0), description="Part of the chain that the step is drawn from: 0 is noise, 1 is clean."
    )

    title = "the gradient of a latent reward at one random step of the denoising chain"
    paper = "[PRFL](https://arxiv.org/abs/2511.21541)"
    shares_rollout = True

    @property
    def needs_rollout(self) -> bool:
        return self.from_data < 1

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        yield from handoff_faults(self.handoff, config)
        yield from range_faults(self.steps_range)
        if self.from_data and math.ceil(self.steps_range[1] * config.rollout.steps) < 2:
            yield "objective.from_data", "steps_range has no step behind the chain's first, where all is noise"


class VaderConfig(RewardGradientConfig):
    name: Literal["vader"] = Field(
        description="The last steps of the chain get the gradient of the reward at its end (DRaFT-K)."
    )
    last_steps: int = Field(
        default=1,
        ge=1,
        description="Number of last steps with gradient (K). VADER's is 1; each further one adds a network call.",
    )

    title = "the gradient of a reward on decoded pixels at the last steps"
    paper = "VADER, https://arxiv.org/abs/2407.08737"

    def trains_every_step(self, steps: int) -> bool:
        return self.last_steps == steps

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        if self.last_steps > config.rollout.steps:
            yield "objective.last_steps", f"the chain has only {config.rollout.steps} steps"


class FullChainConfig(RewardGradientConfig):
    name: Literal["full_chain"] = Field(
        description="Every step gets the exact gradient of the reward at the chain's end (DRaFT)."
    )

    title = "the exact gradient of a reward through the whole denoising chain"
    paper = "DRaFT, https://arxiv.org/abs/2309.17400"

    def trains_every_step(self, steps: int) -> bool:
        return True


class AlignPropConfig(RewardGradientConfig):
    name: Literal["alignprop"] = Field(
        description="The last K steps get the exact gradient, K drawn anew for each batch (AlignProp)."
    )
    last_steps: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        default=None, description="Smallest and largest K, both included; null is 1 and one less than rollout.steps."
    )

    title = "the gradient of a reward at a random number of last steps"
    paper = "AlignProp, https://arxiv.org/abs/2310.03739"
    fewest_steps = 2

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        steps, (low, high) = config.rollout.steps, self.last_steps or (1, 1)
        if not low <= high <= steps:
            yield "objective.last_steps", f"needs low <= high <= {steps}, the chain's steps; got [{low}, {high}]"


class DraftLvConfig(RewardGradientConfig):
    name: Literal["draft_lv"] = Field(
        description="The last step gets the gradient, averaged over fresh noisings of the chain's end (DRaFT-LV)."
    )
    copies: int = Field(
        default=2, ge=1, description="How many times the chain's end is noised again; each costs two network calls."
    )

    title = "the gradient of a reward at the last step, averaged over noises"
    paper = "DRaFT-LV, https://arxiv.org/abs/2309.17400"
    fewest_steps = 2


class ReflConfig(RewardGradientConfig):
    name: Literal["refl"] = Field(
        description="One random late step gets the gradient, scored at its clean prediction (ReFL)."
    )
    steps_range: tuple[float, float] = Field(
        default=(0.75, 1.0), description="Part of the chain that the step is drawn from; ReFL's is the last quarter."
    )

    title = "the gradient of a reward at the clean prediction of a late step"
    paper = "ReFL, https://arxiv.org/abs/2304.05977"
    shares_rollout = True

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        yield from range_faults(self.steps_range)


class DrTuneConfig(RewardGradientConfig):
    name: Literal["drtune"] = Field(
        description="A few steps over the whole chain get the gradient, which does not pass through their "
        "inputs (DRTune)."
    )
    trained_steps: int = Field(default=3, ge=1, description="Steps that get gradient: one network call each.")
    spacing: Literal["even", "random"] = Field(
        default="even",
        description="even: steps at even distances, the first one at random. random: all of them at random.",
    )
    early_stop: Share = Field(
        default=0.0,
        description="End the chain early with a clean prediction, at a random step in this last part of the "
        "chain. 0 runs it to its end; 0.4 saves a fifth of the rollout on average.",
    )

    title = "the gradient of a reward at a few steps of the chain"
    paper = "DRTune, https://arxiv.org/abs/2405.00760"

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        if self.trained_steps > config.rollout.steps:
            yield "objective.trained_steps", f"the chain has only {config.rollout.steps} steps"


class LeapAlignConfig(RewardGradientConfig):
    name: Literal["leapalign"] = Field(
        description="Two leaps between random steps of the rolled-out chain get the gradient (LeapAlign)."
    )
    alpha: Share = Field(
        default=0.3,
        description="Share that is kept of the nested gradient, which passes through the second leap's input.",
    )
    similarity_floor: float | None = Field(
        default=0.1,
        gt=0,
        description="Each sample is weighted by 1 / (sum over its two leaps of the distance between the leap's "
        "end and the chain). A distance is a mean absolute difference of latents, and counts as at least this value. "
        "null gives all samples the same weight.",
    )

    title = "the gradient of a reward along two leaps over the chain"
    paper = "LeapAlign, https://arxiv.org/abs/2604.15311"
    fewest_steps = 2

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        if config.rollout.stride > 1 and self.similarity_floor is not None:
            what = "a leap that the rollout itself takes misses its end by nothing, so objective.similarity_floor would"
            fix = "take stride: 1, or similarity_floor: null"
            yield "rollout.stride", f"{what} weigh samples by the drawn steps; {fix}"


class InstructVideoConfig(RewardGradientConfig):
    name: Literal["instructvideo"] = Field(
        description="The chain starts from a noised clip of the data, under its own prompt; the last steps get the "
        "gradient (InstructVideo)."
    )
    start: float = Field(
        default=0.4,
        gt=0,
        lt=1,
        description="Share of the chain that is skipped: clips are noised to the sigma at its end, and the chain "
        "starts there.",
    )
    last_steps: int = Field(default=1, ge=1, description="Number of last steps with gradient.")
    temporal_decay: float | None = Field(
        default=None,
        ge=0,
        description="For pixel rewards: score each drawn latent frame alone, with weight exp(-decay * "
        "distance to the clip's middle frame). InstructVideo's decay is 1. null scores all "
        "frames together.",
    )

    title = "the gradient of a reward at the end of a chain that starts from noised clips"
    paper = "InstructVideo, https://arxiv.org/abs/2312.12490"
    fewest_steps = 2

    @property
    def starts_from_data(self) -> bool:
        return True

    @property
    def scores_frames_alone(self) -> bool:
        return self.temporal_decay is not None and self.frames not in ("one", 1)

    def steps_left(self, steps: int) -> int:
        """Number of steps that remain after ``start``, of a chain of ``steps`` steps."""
        return steps - inner_node(self.start, steps)

    def trains_every_step(self, steps: int) -> bool:
        return self.last_steps == self.steps_left(steps)

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        rollout, reward = config.rollout, config.reward
        if rollout.solver_facts.multistep:
            what = f"objective {self.name} starts inside the chain; {rollout.solver} needs all before it"
            yield "rollout.solver", what
        left = self.steps_left(rollout.steps)
        if rollout.steps > 1 and self.last_steps > left:
            what = f"objective.start leaves only {left} of the chain's {rollout.steps} steps"
            yield "objective.last_steps", what
        if reward and reward.space == "latent":
            yield from unread(self, "objective", ["temporal_decay"], "a latent reward")
        elif self.temporal_decay is not None and reward and reward.aggregate == "logsigmoid":
            yield "objective.temporal_decay", "a weighted logit is no logit of a label; use reward.aggregate: sum"


def inner_node(share: float, steps: int) -> int:
    """Return the node nearest to a share of the chain (0 is noise, 1 is clean), but never the first or last node.

    steps: length of the chain, 2 or more.
    """
    return min(max(1, round(share * steps)), steps - 1)


class DenseProcessConfig(FromDataConfig, RewardGradientConfig):
    name: Literal["dense_process"] = Field(
        description="Rewards at several states of one rollout; one pass of the adjoint sums their gradients."
    )
    rewards: int = Field(
        default=4,
        ge=1,
        description="Number N of states that are scored: the chain is cut into N equal parts, and the state "
        "after one random step of each is scored.",
    )
    handoff: Literal["next", "clean"] = Field(
        default="next", description="Score the next latents, or the clean predictions of the steps."
    )
    credit: Literal["chain", "step"] = Field(
        default="chain",
        description="chain: a reward trains every drawn step before it. step: it trains only the step that "
        "leads to it, as prfl does.",
    )
    beta: Share = Field(
        default=0.0,
        description="For credit: chain, the share of the gradient that passes through the networks' inputs. "
        "0 costs one network call for each drawn step. Above 0 (1 is exact) the steps between "
        "are differentiated and trained too.",
    )
    steps_range: tuple[float, float] = Field(
        default=(0.0, 1.0), description="Part of the chain that the steps are drawn from: 0 is noise, 1 is clean."
    )

    title = "the gradients of rewards at several states of each denoising chain"
    shares_rollout = True

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        yield from handoff_faults(self.handoff, config)
        yield from range_faults(self.steps_range)
        steps, (low, high) = config.rollout.steps, self.steps_range
        first = max(math.floor(low * steps), 1 if self.from_data else 0)
        parts = math.ceil(high * steps) - first
        if self.rewards > parts:
            which = " behind the first" if self.from_data else ""
            yield "objective.rewards", f"steps_range has only {parts} of the chain's {steps} steps{which}"
        if self.credit == "step":
            yield from unread(self, "objective", ["beta"], "credit: step")
        if self.beta and config.rollout.gradients_per_rollout > 1:
            what = "objective.beta: a gradient along the chain needs latents of the present policy; take beta: 0"
            yield "rollout.gradients_per_rollout", what
