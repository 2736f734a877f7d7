"""``objective``: what all objectives have in common, SFT, and the training of a reward.

Objectives that follow the gradient of a reward are in reward_gradient.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from prfl.config.section import Fault, Section, unread

if TYPE_CHECKING:
    from prfl.config.schema import Config


class ObjectiveBase(Section):
    """What all objectives have in common.

    A subclass that defines ``name`` as a Literal can be chosen in a config; there is no other list of objectives.
    title, paper: what the model card of an exported policy says about its training.
    """

    name: str = Field(description="The objective.")
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    trains_policy: ClassVar[bool] = True
    follows_reward: ClassVar[bool] = False

    @property
    def card_text(self) -> str:
        """``title``, with the paper if there is one."""
        return f"{self.title} ({self.paper})" if self.paper else self.title

    @property
    def reads_clips(self) -> bool:
        """Whether it trains on the clips of the data section."""
        return True


class SftConfig(ObjectiveBase):
    name: Literal["sft"] = Field(description="Flow matching on the cached clips.")
    prompt_dropout: float = Field(default=0.1, ge=0, le=1, description="Share of clips trained without their prompt.")

    title = "flow matching on videos (SFT)"

    def conflicts(self, config: Config) -> Iterator[Fault]:
        if config.reward:
            yield "reward", "objective sft does not read it"


# Keys of PreferenceConfig that only a reward of this space reads.
KEYS_OF_SPACE = {"latent": ["sigma_sampling"], "pixel": ["frames", "keep_decoded"]}


class PreferenceConfig(ObjectiveBase):
    name: Literal["preference"] = Field(description="Train a reward on labels or preferences.")
    loss: Literal["bce", "bradley_terry", "rao_kupper", "thurstone"] = Field(
        description="bce reads labels, the others read pairs. rao_kupper models ties; thurstone trusts "
        "noisy latents less."
    )
    eta: float = Field(default=5.0, gt=1, description="For rao_kupper: a larger value expects more ties.")
    sigma_sampling: Literal["uniform", "shifted", "mixture"] = Field(
        default="uniform",
        description="Noise levels in training: uniform over 0 to 1, shifted as the sampler's, or a mixture "
        "of both in halves.",
    )
    frames: int | None = Field(
        default=None, ge=1, description="Frames of each clip that a pixel reward sees in one step; null is all."
    )
    keep_decoded: bool = Field(default=False, description="Keep a pixel reward's decoded clips in host memory.")

    trains_policy = False

    @property
    def samples_compared(self) -> int:
        """Number of clips in one term of the loss: 1 for a label, 2 for a preference."""
        return 1 if self.loss == "bce" else 2

    def conflicts(self, config: Config) -> Iterator[Fault]:
        if config.reward:
            space = config.reward.space
            others = [key for other, keys in KEYS_OF_SPACE.items() if other != space for key in keys]
            yield from unread(self, "objective", others, f"a {space} reward")
        if self.loss == "bce" and config.data.makes_pairs:
            yield "objective.loss", "the generator video_clips makes pairs, and bce needs labels; take bradley_terry"
        if self.loss != "rao_kupper":
            yield from unread(self, "objective", ["eta"], f"loss {self.loss}")
