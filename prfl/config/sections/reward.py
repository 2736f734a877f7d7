"""``reward``: the reward that the objective maximises, or trains.

A published reward (trained by others) is a section in public_rewards.py and a key of ``PixelRewardConfig`` here.  The
class that computes it is chosen in factory/reward.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from prfl.config.section import MAY_CHANGE, Fault, Section, Source, place, unread
from prfl.config.sections.backbone import AdapterConfig
from prfl.config.sections.public_rewards import (
    ActionConfig,
    AestheticConfig,
    CallableConfig,
    ClipConfig,
    CoherenceConfig,
    CriticConfig,
    HpsConfig,
    Hpsv3Config,
    ImageRewardConfig,
    MpsConfig,
    ObjectConfig,
    PickScoreConfig,
    PublicRewardConfig,
    VideoAlignConfig,
)

if TYPE_CHECKING:
    from prfl.config.schema import Config


class LatentHeadConfig(Section):
    dimensions: list[str] = Field(min_length=1, description="Names of the labels that the head scores.")
    blocks: list[int] = Field(min_length=1, description="Read the hidden states after these blocks (the first is 0).")
    pooling: Literal["query", "mean"] = Field(
        default="query",
        description="How the tokens are pooled: query attends with learned queries, mean averages them (the baseline).",
    )
    inner: int = Field(default=128, ge=1, description="Channels that the tokens are projected to; a multiple of heads.")
    queries: int = Field(
        default=1, ge=1, description="Number of learned queries that attend over all tokens; one is usually enough."
    )
    heads: int = Field(default=4, ge=1, description="Attention heads of the pooling; inner is a multiple of it.")
    hidden: int = Field(default=256, ge=1, description="Width of the MLP that turns the pooled features into scores.")
    film: bool = Field(default=True, description="Scale and shift the pooled features by a function of sigma.")
    adapter: AdapterConfig | None = Field(
        default=None, description="An adapter on the blocks that the head reads; null keeps them frozen."
    )

    def conflicts(self, config: Config) -> Iterator[Fault]:
        if self.inner % self.heads:
            yield "reward.head.heads", f"{self.heads} does not divide inner {self.inner}"
        if self.pooling == "mean":
            yield from unread(self, "reward.head", ["queries", "heads"], "pooling mean")


class PixelHeadConfig(Section):
    dimensions: list[str] = Field(min_length=1, description="Names of the labels that the network scores.")
    size: int = Field(default=32, ge=8, description="Frames are resized to this height and width.")
    hidden: int = Field(default=32, ge=4, multiple_of=4, description="Channels after the first layer.")
    inner: int = Field(default=96, ge=4, multiple_of=4, description="Channels of a frame's description.")


TRAINED_REWARD = "A trained reward: a folder that objective preference wrote, a hub id, or 'shapes' (inside)."


class RewardBase(Section):
    """What rewards on latents and on pixels have in common.

    A subclass that defines ``space`` as a Literal can be chosen in a config; there is no other list of spaces.
    """

    instead = {
        "scores": "each reward is a key here, and what each of its scores counts is in weights, as: reward: {space: "
        "pixel, shape: linear, hps: {weights: FILE}, videoalign: {model: FOLDER}, weights: {hps: 15.0, MQ: 2.0}}"
    }
    space: str = Field(description="What is scored.")
    weights: dict[str, float] | None = Field(
        default=None, min_length=1, description="Weight of each dimension; one that is not named does not count."
    )
    aggregate: Literal["sum", "logsigmoid"] = Field(
        default="sum", description="Weighted sum of the scores, or of the log-probabilities of good labels."
    )
    shape: Literal["linear", "hinge"] = Field(
        default="hinge",
        description="Loss of the video model for a score r: linear is -r; hinge is relu(target - r), which "
        "is 0 at the target and above.",
    )
    target: float = Field(default=2.0, description="The score r at which the hinge stops pulling.")
    scale: float = Field(
        default=0.1,
        gt=0,
        description="Factor of the reward's loss. AdamW normalises gradients, so it matters only relative "
        "to other losses: objective.distance_weight and objective.sft.",
    )
    batch: int | None = Field(
        default=None,
        ge=1,
        description="Samples scored at once, to save memory; the gradient is the same. null is all.",
        json_schema_extra=MAY_CHANGE,
    )

    @property
    def paths(self) -> list[str]:
        """``path`` as a list: several, one, or none if it is not set."""
        path: str | list[str] | None = getattr(self, "path", None)
        return [path] if isinstance(path, str) else list(path or [])

    @property
    def decodes(self) -> bool:
        """Whether it scores pixels, which needs the VAE's decoder in every step."""
        return self.space == "pixel"

    @property
    def head_dimensions(self) -> list[str]:
        """The dimensions that a new reward is to score; empty if the config has no ``head``."""
        head: LatentHeadConfig | PixelHeadConfig | None = getattr(self, "head", None)
        return head.dimensions if head else []

    @property
    def public(self) -> list[PublicRewardConfig]:
        """The published rewards that the config names instead of ``path``."""
        return [getattr(self, key) for key, value in vars(self).items() if isinstance(value, PublicRewardConfig)]

    def title(self) -> str:
        """The line about this reward in the model card of a policy that was trained with it."""
        return "; ".join(public.title() for public in self.public) or f"A {self.space} reward"

    def files(self) -> list[Source]:
        if self.public:
            return [source for public in self.public for source in public.files()]
        return [Source("reward.path", path, "reward") for path in self.paths]

    def conflicts(self, config: Config) -> Iterator[Fault]:
        if config.trains_reward:
            # These keys turn a score into the loss of the video model, which is not trained here.
            turned = ["weights", "aggregate", "shape", "target", "scale", "batch"]
            yield from unread(self, "reward", turned, f"objective {config.objective.name}")
        elif config.follows_reward:
            for public in self.public:
                yield from unread(self, "reward", ["path"], public.key)
                yield from public.conflicts(config)
            if self.shape == "linear":
                yield from unread(self, "reward", ["target"], "shape linear")


class LatentRewardConfig(RewardBase):
    space: Literal["latent"] = Field(description="Scores noisy latents: no VAE in the loop.")
    path: str | Annotated[list[str], Field(min_length=2)] | None = place(
        default=None, description=f"{TRAINED_REWARD} A list of them is followed as one: their mean."
    )
    uncertainty_weight: float = Field(
        default=0.0,
        ge=0,
        description="With several rewards: subtract this times the standard deviation of their scores.",
    )
    head: LatentHeadConfig | None = Field(default=None, description="A new head, for objective.name: preference.")

    def title(self) -> str:
        if len(self.paths) < 2:
            return super().title()
        weight = f"{self.uncertainty_weight:g}"
        return f"The mean of {len(self.paths)} latent rewards less {weight} times the deviation between them"

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        if config.trains_reward:
            yield from unread(self, "reward", ["uncertainty_weight"], f"objective {config.objective.name}")
            if self.head:
                yield from self.head.conflicts(config)
        elif config.follows_reward:
            if len(self.paths) < 2:
                reader = "one reward, with nobody to disagree with,"
                yield from unread(self, "reward", ["uncertainty_weight"], reader)
            for path in sorted({path for path in self.paths if self.paths.count(path) > 1}):
                yield "reward.path", f"{path} is named twice; an ensemble needs rewards that differ"


class PixelRewardConfig(RewardBase):
    space: Literal["pixel"] = Field(description="Scores decoded pixels.")
    path: str | None = place(default=None, description=TRAINED_REWARD)
    aesthetic: AestheticConfig | None = Field(
        default=None, description="LAION's aesthetic score: mean over frames, about 1 to 10."
    )
    clip: ClipConfig | None = Field(
        default=None, description="How well frames fit the prompt, by CLIP: about 15 to 35."
    )
    pickscore: PickScoreConfig | None = Field(
        default=None, description="PickScore of frames and prompt: about 15 to 25."
    )
    hps: HpsConfig | None = Field(default=None, description="HPS v2 of frames and prompt: about 0.2 to 0.35.")
    imagereward: ImageRewardConfig | None = Field(
        default=None, description="ImageReward's rating of frames and prompt: about -2 to 2."
    )
    mps: MpsConfig | None = Field(default=None, description="MPS's preference for frames and prompt: about 0 to 20.")
    hpsv3: Hpsv3Config | None = Field(
        default=None, description="HPSv3 of frames and prompt, on Qwen2-VL-7B: about 0 to 12."
    )
    videoalign: VideoAlignConfig | None = Field(
        default=None, description="VideoAlign's VQ, MQ and TA on Qwen2-VL-2B: each about -3 to 3."
    )
    object: ObjectConfig | None = Field(
        default=None, description="Whether named objects are in the frames, or are absent (YOLOS)."
    )
    action: ActionConfig | None = Field(default=None, description="Log-probability of an action (VideoMAE).")
    coherence: CoherenceConfig | None = Field(
        default=None, description="How well the video's second half follows from the first (V-JEPA 2)."
    )
    critic: CriticConfig | None = Field(
        default=None, description="A vision-language model's answers to questions about the video: log-odds."
    )
    latent: str | None = place(
        default=None,
        description="A trained latent reward that is followed beside the pixel rewards, at the same clean "
        "latents: a folder, a hub id, or 'shapes'.",
    )
    balance: Literal["none", "gradient_norm"] = Field(
        default="none",
        description="With several rewards: none adds their gradients as they are. gradient_norm first scales "
        "each reward's gradient at the pixels to the same length, so that only the weights "
        "decide how much each reward counts.",
    )
    callable: CallableConfig | None = Field(default=None, description="A function of your own.")
    head: PixelHeadConfig | None = Field(default=None, description="A new network, for objective.name: preference.")

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        if config.trains_reward:
            keys = [public.key.removeprefix("reward.") for public in self.public]
            yield from unread(self, "reward", [*keys, "latent", "balance"], f"objective {config.objective.name}")
        elif self.latent is not None and self.balance != "none":
            what = "lengths of gradients are compared at the pixels, and reward.latent reads none"
            yield "reward.balance", f"{what}; weigh it by reward.weights, or leave one of the two out"
        elif len(self.public) < 2:
            yield from unread(self, "reward", ["balance"], "one reward, with nothing to balance,")

    def files(self) -> list[Source]:
        beside = [] if self.latent is None else [Source("reward.latent", self.latent, "reward")]
        return super().files() + beside

    def title(self) -> str:
        return super().title() + ("" if self.latent is None else "; a latent reward beside it")
