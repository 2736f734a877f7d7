"""``reward``: what is maximised, or trained.

A reward that others trained, in files of its own form, is a ``PublicRewardConfig`` and a key of its space's section;
factory/reward.py has its class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from prfl.config.section import MAY_CHANGE, Fault, FolderOrFile, Section, Source, is_hub_id, place, unread
from prfl.config.sections.backbone import AdapterConfig

if TYPE_CHECKING:
    from prfl.config.schema import Config


class LatentHeadConfig(Section):
    dimensions: list[str] = Field(min_length=1, description="Names of the labels that the head scores.")
    blocks: list[int] = Field(min_length=1, description="Read the hidden states after these blocks (the first is 0).")
    pooling: Literal["query", "mean"] = Field(
        default="query",
        description="How tokens are gathered: query attends with learned queries, mean is the baseline.",
    )
    inner: int = Field(default=128, ge=1, description="Channels that the tokens are projected to; heads divides it.")
    queries: int = Field(
        default=1, ge=1, description="Number of learned queries that attend over all tokens; one is usually enough."
    )
    heads: int = Field(default=4, ge=1, description="Attention heads of the pooling; they divide inner.")
    hidden: int = Field(default=256, ge=1, description="Width of the MLP that makes scores of what was gathered.")
    film: bool = Field(default=True, description="Scale and shift the pooled features by a function of sigma.")
    adapter: AdapterConfig | None = Field(default=None, description="The head's own adapter; null is frozen blocks.")

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


class PublicRewardConfig(Section):
    """A reward that others trained, in place of ``reward.path``: what all of them have in common."""

    key: ClassVar[str]  # its yaml path

    def title(self) -> str:
        """What the card of a policy that followed it says."""
        raise NotImplementedError


AESTHETIC_MLP = "download sac+logos+ava1-l14-linearMSE.pth of LAION's improved-aesthetic-predictor, and name it here"


class AestheticConfig(PublicRewardConfig):
    key = "reward.aesthetic"
    mlp: FolderOrFile = place(description="LAION's MLP for ViT-L/14: its .pth (only tensors are read) or safetensors.")
    clip: str = place(default="openai/clip-vit-large-patch14", description="CLIP ViT-L/14: a folder or a hub id.")
    revision: str | None = Field(default=None, description="Revision of a hub CLIP; null is its newest.")

    def title(self) -> str:
        return f"LAION's aesthetic score on CLIP ({self.clip})"

    def files(self) -> list[Source]:
        weights = "model.safetensors", "model.safetensors.index.json"
        return [
            Source(f"{self.key}.clip", self.clip, "model", self.revision, weights),
            Source(f"{self.key}.mlp", str(self.mlp), "file", remedy=AESTHETIC_MLP),
        ]

    def conflicts(self, config: Config) -> Iterator[Fault]:
        reward = config.reward
        assert reward is not None
        if not is_hub_id(self.clip):
            yield from unread(self, self.key, ["revision"], "a CLIP in a folder")
        if reward.aggregate == "logsigmoid":
            yield "reward.aggregate", "the aesthetic score is no logit of a label; use sum"
        if reward.shape == "hinge" and reward.target == type(reward).model_fields["target"].default:
            yield "reward.target", "nearly every picture scores above it, so there is nothing to pull; VADER's is 10"


class RewardBase(Section):
    """What all spaces have in common.  A space is in the config's union because it is defined, below."""

    space: str = Field(description="What is scored.")
    weights: dict[str, float] | None = Field(
        default=None, min_length=1, description="Weight of each dimension; one that is not named does not count."
    )
    aggregate: Literal["sum", "logsigmoid"] = Field(
        default="sum", description="Weighted sum of the scores, or of the log-probabilities of good labels."
    )
    shape: Literal["linear", "hinge"] = Field(
        default="hinge",
        description="Loss of the video model: linear is -r; hinge is relu(target - r), 0 at the target and above.",
    )
    target: float = Field(default=2.0, description="The score r at which the hinge stops pulling.")
    scale: float = Field(
        default=0.1,
        gt=0,
        description="Factor of the reward's loss; AdamW undoes it, except beside distance_weight.",
    )
    batch: int | None = Field(
        default=None,
        ge=1,
        description="Samples scored at once, to save memory: the same gradient; null is all.",
        json_schema_extra=MAY_CHANGE,
    )

    @property
    def paths(self) -> list[str]:
        """``path`` as a list, whichever way it was given."""
        path: str | list[str] | None = getattr(self, "path", None)
        return [path] if isinstance(path, str) else list(path or [])

    @property
    def decodes(self) -> bool:
        """Whether it reads pixels, so that the VAE is needed in every step."""
        return self.space == "pixel"

    @property
    def head_dimensions(self) -> list[str]:
        """What a new reward is to score; empty where none is described."""
        head: LatentHeadConfig | PixelHeadConfig | None = getattr(self, "head", None)
        return head.dimensions if head else []

    @property
    def public(self) -> PublicRewardConfig | None:
        """The public reward that is named in place of ``path``."""
        keys = [key for key, value in vars(self).items() if isinstance(value, PublicRewardConfig)]
        return getattr(self, keys[0]) if keys else None

    def title(self) -> str:
        """What the card of a policy that followed it says."""
        return self.public.title() if self.public else f"A {self.space} reward"

    def files(self) -> list[Source]:
        if self.public:
            return self.public.files()
        return [Source("reward.path", path, "reward") for path in self.paths]

    def conflicts(self, config: Config) -> Iterator[Fault]:
        if config.trains_reward:
            # How a score becomes the loss of the video model.
            turned = ["weights", "aggregate", "shape", "target", "scale", "batch"]
            yield from unread(self, "reward", turned, f"objective {config.objective.name}")
        elif config.follows_reward:
            if self.public:
                yield from unread(self, "reward", ["path"], self.public.key)
                yield from self.public.conflicts(config)
            if self.shape == "linear":
                yield from unread(self, "reward", ["target"], "shape linear")


class LatentRewardConfig(RewardBase):
    space: Literal["latent"] = Field(description="Scores noisy latents: no VAE in the loop.")
    path: str | Annotated[list[str], Field(min_length=2)] | None = place(
        default=None, description=f"{TRAINED_REWARD} A list of them is followed as one: their mean."
    )
    uncertainty_weight: float = Field(
        default=0.0, ge=0, description="Of several rewards: subtract this times the deviation between their scores."
    )
    head: LatentHeadConfig | None = Field(default=None, description="A new head, where objective.name is preference.")

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
        default=None, description="LAION's aesthetic score, in place of path: mean over frames, about 1 to 10."
    )
    head: PixelHeadConfig | None = Field(default=None, description="A new one, where objective.name is preference.")

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        if config.trains_reward and self.public:
            key = self.public.key.removeprefix("reward.")
            yield from unread(self, "reward", [key], f"objective {config.objective.name}")
