"""The schema of a config: one frozen class per yaml section.  Unknown keys are errors; required keys have no default.

A choice that brings its own keys (the generator, the reward's space, the objective) is a union, and one key such as
``objective.name`` selects the member.  A key of another member is an error, like a misspelt one.  Each section is a
file in sections/, with its own rules; the rules between sections are in rules.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, TypeAdapter

from prfl.config.section import MAY_CHANGE, SEEDS, FolderOrFile, Section, Source, one_of
from prfl.config.sections.backbone import BackboneConfig
from prfl.config.sections.data import DataConfig
from prfl.config.sections.evaluation import EvaluationConfig
from prfl.config.sections.objective import ObjectiveBase, PreferenceConfig
from prfl.config.sections.reward import RewardBase
from prfl.config.sections.reward_gradient import RewardGradientConfig
from prfl.config.sections.rollout import RolloutConfig
from prfl.config.sections.steering import SteeringBase
from prfl.config.sections.training import TrainingConfig

if TYPE_CHECKING:
    ObjectiveConfig = ObjectiveBase
    RewardConfig = RewardBase
    SteeringConfig = SteeringBase
else:
    ObjectiveConfig = one_of(ObjectiveBase, "name")
    RewardConfig = one_of(RewardBase, "space")
    SteeringConfig = one_of(SteeringBase, "name")


class Config(Section):
    """One stage: what ``prfl train`` runs."""

    version: Literal[1] = Field(description="Version of this format.")
    run: FolderOrFile = Field(description="Run folder: everything that the run writes.", json_schema_extra=MAY_CHANGE)
    seed: int = Field(
        ge=0,
        lt=SEEDS,
        description="Seed of every random draw of the training: the same seed and config give the same run.",
    )
    backbone: BackboneConfig = Field(description="The video model, and which of its weights are trained.")
    data: DataConfig = Field(description="Clips, prompts, their size and their cache.")
    reward: RewardConfig | None = Field(
        default=None,
        discriminator="space",
        description="The reward that the objective maximises, or trains; none for sft.",
    )
    rollout: RolloutConfig = Field(description="The sampling chain that training rolls out.")
    objective: ObjectiveConfig = Field(
        discriminator="name", description="The method: which steps of the chain get gradient, and from what."
    )
    training: TrainingConfig = Field(
        description="The optimizer and the training loop: number of steps, batch, learning rate."
    )
    evaluation: EvaluationConfig = Field(
        description="What is measured during the run, and at its end.", json_schema_extra=MAY_CHANGE
    )
    steering: SteeringConfig | None = Field(
        default=None,
        discriminator="name",
        description="How prfl sample chooses among several chains of a video while they are drawn; null "
        "draws one chain.",
        json_schema_extra=MAY_CHANGE,
    )

    @property
    def trains_reward(self) -> bool:
        """Whether the stage trains a reward; the video model then stays as it is."""
        return not self.objective.trains_policy

    @property
    def reads_clips(self) -> bool:
        """Whether the objective trains on clips; if not, a manifest or a folder is read for its prompts alone."""
        return self.data.has_clips and self.objective.reads_clips

    @property
    def follows_reward(self) -> bool:
        """Whether the video model is trained towards a reward."""
        return self.objective.follows_reward

    @property
    def reward_gradient(self) -> RewardGradientConfig | None:
        """The objective if it follows the gradient of a reward, else None."""
        return self.objective if isinstance(self.objective, RewardGradientConfig) else None

    @property
    def preference(self) -> PreferenceConfig | None:
        """The objective if it trains a reward from labels or preferences, else None."""
        return self.objective if isinstance(self.objective, PreferenceConfig) else None

    def files(self) -> list[Source]:
        """List all that the run reads: it must exist before the run, or be downloaded."""
        sections = [value for value in vars(self).values() if isinstance(value, Section)]
        return [source for section in sections for source in section.files()]


class StagesConfig(Section):
    """Several configs run one after another."""

    version: Literal[1] = Field(description="Version of this format.")
    stages: list[str] = Field(min_length=1, description="Config files in order, as paths from this file's folder.")


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a config file: a stage, a file that extends a stage, or a list of stages."""
    schema = TypeAdapter(Config | StagesConfig).json_schema()
    keys = schema["$defs"]["Config"]["properties"]
    sections = {name: {"description": key["description"]} for name, key in keys.items()}  # sections may be partial
    extends = {"description": "The config beside this one whose keys this one changes.", "type": "string"}
    schema["$defs"]["ExtendingConfig"] = {
        "type": "object",
        "properties": {"extends": extends, **sections},
        "required": ["extends", "version", "run"],
        "additionalProperties": False,
    }
    schema["anyOf"].insert(1, {"$ref": "#/$defs/ExtendingConfig"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A config of prfl", **schema}
