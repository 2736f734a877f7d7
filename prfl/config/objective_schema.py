"""The ``objective`` sections that train a video model by the gradient of a reward: one class a method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prfl.config.data_schema import Section

Share = Annotated[float, Field(ge=0, le=1)]


class CheaperConfig(Section):
    """``rollout.cheaper``: for the steps on the way to the trained ones, which stay exact."""

    products: Literal["exact", "float8"] = Field(
        default="exact",
        description="float8 multiplies the base's linear layers in float8, twice as fast on a GPU from 8.9 on; "
        "adapters stay as they are.",
    )
    attention: Literal["exact", "int8"] = Field(
        default="exact",
        description="int8 attends among a video's tokens in 8 bits, on a GPU by the package sageattention.",
    )
    cache: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Skip the blocks behind the first where that one's residual has changed by less than this share "
        "since they were last run, sample by sample; 0 is never, and rollout/cached says how often.",
    )


class SftRegulariserConfig(Section):
    every: int = Field(
        default=1,
        ge=1,
        description="Reward steps between two SFT steps: 1 alternates, 4 is an SFT step before every fourth.",
    )
    weight: float = Field(default=1.0, gt=0, description="Factor of the SFT loss in its own optimizer step.")
    prompt_dropout: float = Field(default=0.1, ge=0, le=1, description="Share of clips trained without their prompt.")


class SteeringConfig(Section):
    """What every objective that follows a reward has in common."""

    name: str = Field(description="The method: which steps of the chain get gradient, and from what.")
    frames: Literal["all", "one"] | Annotated[int, Field(ge=1)] = Field(
        default="all",
        description="Latent frames that are decoded for a pixel reward: all, one at random, or this number: one of "
        "each of so many equal parts of the clip.",
    )
    distance_weight: float = Field(default=0.0, ge=0, description="Weight of the velocity's distance to the base.")
    sft: SftRegulariserConfig | None = Field(
        default=None,
        description="SFT on the data section as a regulariser, which keeps the model near its data; null is none.",
    )


class FromDataConfig(SteeringConfig):
    from_data: Share = Field(
        default=0.0,
        description="Share of the steps whose chains start from noised clips of the data, at the step that is drawn: "
        "they need no rollout up to there.",
    )


class PrflConfig(FromDataConfig):
    name: Literal["prfl"] = Field(description="One random step of the chain gets the gradient of a latent reward.")
    handoff: Literal["next", "clean"] = Field(
        default="next", description="Score the next latent, or the clean prediction of the step."
    )
    steps_range: tuple[float, float] = Field(
        default=(0.0, 1.0), description="Part of the chain that the step is drawn from: 0 is noise, 1 is clean."
    )


class ReflConfig(SteeringConfig):
    name: Literal["refl"] = Field(description="One random late step, scored at its clean prediction (ReFL).")
    steps_range: tuple[float, float] = Field(
        default=(0.75, 1.0), description="Part of the chain that the step is drawn from; ReFL's is the last quarter."
    )


class VaderConfig(SteeringConfig):
    name: Literal["vader"] = Field(
        description="The last steps of the chain get the gradient of the reward at its end (DRaFT-K)."
    )
    last_steps: int = Field(
        default=1,
        ge=1,
        description="Number of last steps with gradient (K); VADER's is 1, more costs a network call each.",
    )


class FullChainConfig(SteeringConfig):
    name: Literal["full_chain"] = Field(
        description="Every step gets the exact gradient of the reward at the chain's end (DRaFT)."
    )


class AlignPropConfig(SteeringConfig):
    name: Literal["alignprop"] = Field(
        description="The last K steps get the exact gradient, K drawn anew for each batch (AlignProp)."
    )
    last_steps: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        default=None, description="Smallest and largest K, both included; null is 1 and one less than the chain."
    )


class DraftLvConfig(SteeringConfig):
    name: Literal["draft_lv"] = Field(
        description="The last step, averaged over fresh noises put on the chain's end (DRaFT-LV)."
    )
    copies: int = Field(
        default=2, ge=1, description="Times that the clean end is noised anew; each costs two network calls."
    )


class DrTuneConfig(SteeringConfig):
    name: Literal["drtune"] = Field(
        description="A few steps over the whole chain, their inputs cut off from the gradient (DRTune)."
    )
    trained_steps: int = Field(default=3, ge=1, description="Steps that get gradient: one network call each.")
    spacing: Literal["even", "random"] = Field(
        default="even", description="Steps at even distances behind a random first one, or all of them at random."
    )
    early_stop: Share = Field(
        default=0.0,
        description="Last part of the chain from which a step is drawn whose clean prediction ends the chain; 0 runs "
        "it to its end, 0.4 saves a fifth of the rollout.",
    )


class LeapAlignConfig(SteeringConfig):
    name: Literal["leapalign"] = Field(
        description="Two leaps over the rolled out chain, between random steps: gradient to any of them (LeapAlign)."
    )
    alpha: Share = Field(
        default=0.3, description="Share of the nested gradient, through the second leap's input, that is kept."
    )
    similarity_floor: float | None = Field(
        default=0.1,
        gt=0,
        description="A sample weighs 1 / (how far its two leaps land from the chain, each no less than this, a mean "
        "absolute difference of latents); null weighs all alike.",
    )


class InstructVideoConfig(SteeringConfig):
    name: Literal["instructvideo"] = Field(
        description="The chain starts from a noised clip of the data, under its own prompt; the last steps get the "
        "gradient (InstructVideo)."
    )
    start: float = Field(
        default=0.4, gt=0, lt=1, description="Part of the chain that is left out: clips are noised to its sigma there."
    )
    last_steps: int = Field(default=1, ge=1, description="Number of last steps with gradient.")
    temporal_decay: float | None = Field(
        default=None,
        ge=0,
        description="For pixel rewards: score each drawn latent frame by itself, with weight exp(-decay * its distance "
        "to the clip's middle frame), InstructVideo's is 1; null scores all of them together.",
    )


def inner_node(share: float, steps: int) -> int:
    """The node at a share of a chain of two steps or more (0 is noise, 1 clean) that is neither of its ends."""
    return min(max(1, round(share * steps)), steps - 1)


class DenseProcessConfig(FromDataConfig):
    name: Literal["dense_process"] = Field(
        description="Rewards at several states of one rollout, their gradients summed in one walk back."
    )
    rewards: int = Field(
        default=4, ge=1, description="States that are scored: behind one random step of each of so many equal parts."
    )
    handoff: Literal["next", "clean"] = Field(
        default="next", description="Score the next latents, or the clean predictions of the steps."
    )
    credit: Literal["chain", "step"] = Field(
        default="chain",
        description="chain: a reward trains every drawn step before it; step: only the one that leads to it, as prfl.",
    )
    beta: Share = Field(
        default=0.0,
        description="Share of the gradient through the networks' inputs, for credit: chain. 0 is a network call for "
        "each drawn step; above 0 (1 is exact) every step between is walked, and trained too.",
    )
    steps_range: tuple[float, float] = Field(
        default=(0.0, 1.0), description="Part of the chain that the steps are drawn from: 0 is noise, 1 is clean."
    )
