"""Schema of the config.json of a saved reward: a strict model for each kind, and the hash that tells an edited one.

Sizes are bounded here, and compared with the header of the weights (``checkpoint.SavedReward``), before anything of
that size is allocated: a config is a few lines that a stranger wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prfl.config.messages import shown
from prfl.reward.scores import Normalisation
from prfl.utils.errors import PrflError
from prfl.utils.hashing import json_hash

AGAIN = "save or download the reward again"
LARGEST = 2**20  # of a width, of queries, of a rank: far above any, and no product of them overflows
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Names = Annotated[list[Name], Field(min_length=1, max_length=1000)]
# What may be edited by hand: where the model came from, and what a label means to a person.
UNHASHED = (("config_sha256",), ("backbone", "model_id"), ("backbone", "revision"), ("card", "labels"))

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class BenchmarkScores:
    """How often a reward's scores order a set's pairs as people did (prfl/runs/benchmark.py).

    title, dataset: what the set is called, and its hub id.  accuracy: per dimension of the set, by sigma, on the pairs
    that people decided; accuracy_ties: of three classes, on all pairs, at the best threshold.  decided, ties: how many
    there are.  pairs_read, left_out: rows that were measured, and those without readable videos.
    seconds: to read, encode and score the two videos of a pair.  gib: peak memory.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    title: str
    dataset: str | None
    accuracy: dict[str, dict[str, Share]]
    accuracy_ties: dict[str, dict[str, Share]]
    decided: dict[str, int]
    ties: dict[str, int]
    pairs_read: int
    left_out: int
    seconds: float
    gib: float | None
    device: str

    @property
    def cost(self) -> str:
        memory = f", {self.gib:.2f} GiB at the peak" if self.gib is not None else ""
        return f"{self.seconds:.2g} s a pair{memory}, on {self.device}"


@dataclass(frozen=True)
class RewardCard:
    """What a person should know before using a saved reward.

    labels: what label 1 means, per dimension.  Ranges are (lowest, highest) of the training videos.
    accuracy: per dimension, held-out pairwise accuracy within a prompt by sigma bin, e.g. {"motion": {"0.0-0.2": 0.9}}.
    accuracy_low: the lower ends of its 95 % intervals over prompts.  pairs: of how many pairs, per dimension.
    benchmarks: by the name that ``prfl eval --benchmark`` takes.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    labels: dict[str, str] = field(default_factory=dict)
    frames: tuple[Count, Count] | None = None
    fps: tuple[Rate, Rate] | None = None
    height: tuple[Count, Count] | None = None
    width: tuple[Count, Count] | None = None
    accuracy: dict[str, dict[str, Share]] = field(default_factory=dict)
    accuracy_low: dict[str, dict[str, Share]] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)
    benchmarks: dict[str, BenchmarkScores] = field(default_factory=dict)

    @property
    def clips(self) -> str:
        """The size of the training videos, in words."""
        ranges = {name: getattr(self, name) for name in ("frames", "height", "width", "fps")}
        if None in ranges.values():
            return "videos of a size that the card does not say"
        sizes = {name: f"{low:g}" if low == high else f"{low:g} to {high:g}" for name, (low, high) in ranges.items()}
        return f"{sizes['frames']} frames of {sizes['width']} x {sizes['height']} pixels at {sizes['fps']} fps"


class Stored(BaseModel):
    """A strict model: no unknown keys, no conversion between types, only finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class StoredHead(Stored):
    """The arguments of ``RewardHead``."""

    width: Size
    dimensions: Names
    blocks: Annotated[int, Field(ge=1, le=1000)]
    inner: Size
    heads: Size
    n_queries: Size
    hidden: Size
    pooling: Literal["query", "mean"]
    film: bool

    @model_validator(mode="after")
    def check(self) -> StoredHead:
        if self.inner % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide inner {self.inner}")
        return self


class StoredNetwork(Stored):
    """The arguments of ``PixelNetwork``."""

    text_width: Size
    dimensions: Names
    size: Annotated[int, Field(ge=8, le=4096)]  # no weight has this size: it is what frames are resized to
    hidden: Annotated[Size, Field(multiple_of=4)]
    inner: Annotated[Size, Field(multiple_of=4)]


class StoredAdapter(Stored):
    """The arguments of ``RewardAdapter``."""

    rank: Size
    alpha: Annotated[float, Field(gt=0)]
    targets: Annotated[tuple[Name, ...], Field(min_length=1, max_length=1000)]
    name: Annotated[str, Field(pattern=r"^[\w-]{1,100}$")] = "reward"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # torch takes no larger one


class StoredReward(Stored):
    """What both kinds have in common.  config_sha256: rewards that were saved before it was written have none."""

    format: str
    version: int
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    config_sha256: str | None = None
    normalisation: Normalisation
    card: RewardCard = RewardCard()

    def dimensions(self) -> Sequence[str]:
        raise NotImplementedError

    @model_validator(mode="after")
    def check_names(self) -> StoredReward:
        names = set(self.dimensions())
        if len(names) < len(self.dimensions()):
            raise ValueError("a dimension is named twice")
        if not names == set(self.normalisation.mean) == set(self.normalisation.std):
            raise ValueError(f"the normalisation is of other dimensions than {', '.join(self.dimensions())}")
        return self


class StoredLatent(StoredReward):
    """The config of a ``LatentReward``."""

    kind: ClassVar[str] = "latent-reward"

    backbone: dict[str, Any]  # compared with the backbone that the reward is loaded for
    blocks: Annotated[list[Annotated[int, Field(ge=0, lt=1000)]], Field(min_length=1, max_length=1000)]
    head: StoredHead
    adapter: StoredAdapter | None

    def dimensions(self) -> Sequence[str]:
        return self.head.dimensions

    @model_validator(mode="after")
    def check_blocks(self) -> StoredLatent:
        if self.head.blocks != len(self.blocks):
            raise ValueError(f"the head reads {self.head.blocks} blocks, and {len(self.blocks)} are named")
        if not isinstance(self.backbone.get("model_id"), str):
            raise ValueError("backbone: names no model_id")
        width = self.backbone.get("width")  # of all blocks, or of each
        behind = [width[block] for block in self.blocks if block < len(width)] if isinstance(width, list) else [width]
        if set(map(str, behind)) != {str(self.head.width)}:
            raise ValueError(f"a head of width {self.head.width} for a model of {width!r:.40}")
        return self


class StoredPixel(StoredReward):
    """The config of a ``PixelReward``."""

    kind: ClassVar[str] = "pixel-reward"

    network: StoredNetwork

    def dimensions(self) -> Sequence[str]:
        return self.network.dimensions


Content = TypeVar("Content", bound=StoredReward)
WORDS = {"missing": "missing", "extra_forbidden": "unknown key", "unexpected_keyword_argument": "unknown key"}


def validated(kind: type[Content], text: str, where: str, fix: str = AGAIN) -> Content:
    """Parse the text of a config.json.  Raises PrflError that names the first wrong value and counts the others."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors(include_url=False)

    first = problems[0]
    key = ".".join(map(str, first["loc"]))[:100]
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] != "value_error":
        message += f", got {shown(first)}"
    what = WORDS.get(first["type"]) or message

    more = f" (and {len(problems) - 1} more of its values are wrong)" if len(problems) > 1 else ""
    raise PrflError(what + more, where=f"{where}: {key}" if key else where, fix=fix)


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the sha256 of all that a config.json says, ``UNHASHED`` apart."""
    hashed = json.loads(json.dumps(config))  # a deep copy: keys are removed from it
    for *sections, key in UNHASHED:
        part = hashed
        for section in sections:
            part = part.get(section) or {}
        part.pop(key, None)
    return json_hash(hashed)
