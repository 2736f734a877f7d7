"""``rollout``: the sampling chain that training rolls out, and the properties of its solvers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prfl.config.section import Fault, Section, unread
from prfl.config.sections.experts import FirstFrame, GuidanceScale, first_frame_faults, guided

if TYPE_CHECKING:
    from prfl.config.schema import Config


class GuidanceConfig(Section):
    scale: GuidanceScale = Field(
        default=1.0,
        description="Guidance scale in training; 1 is no guidance, any other value doubles the network "
        "calls. With two experts: {high: 4.0, low: 3.0}.",
    )
    first_frame: FirstFrame = Field(
        default=None,
        description="Guidance scale of the first frame. It changes evenly to scale at the last frame, as in "
        "SVD's pipeline from 1 to 3. null uses scale for all frames.",
    )
    gradient: Literal["none", "cond", "both"] = Field(
        default="none",
        description="none: no guidance in training. cond: guidance, with gradient through the conditional "
        "branch alone. both: guidance, with gradient through both branches.",
    )


class CheaperConfig(Section):
    """``rollout.cheaper``: approximations in the rollout's steps without gradient; trained steps stay exact."""

    products: Literal["exact", "float8"] = Field(
        default="exact",
        description="float8 computes the base's linear layers in float8, on GPUs of compute capability 8.9 "
        "and above; adapters stay as they are.",
    )
    attention: Literal["exact", "int8"] = Field(
        default="exact",
        description="int8 computes attention among a video's tokens in 8 bits; on a GPU it needs the "
        "package sageattention.",
    )
    cache: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Skip all blocks but the first, for each sample by itself, if the first block's residual "
        "has changed by less than this share since the blocks last ran. 0 is never. The metric "
        "rollout/cached says how often blocks were skipped.",
    )


@dataclass(frozen=True)
class SolverFacts:
    """Properties of a solver that the rest of prfl depends on.

    stochastic: its steps add noise.  multistep: a step also uses the network's outputs of earlier steps.
    takes_leaps: it can cross several steps of the chain with one network call.
    keys: the keys of the rollout section that only solvers like this one read.
    """

    stochastic: bool = False
    multistep: bool = False
    takes_leaps: bool = False
    keys: tuple[str, ...] = ()


SOLVERS = {
    "euler": SolverFacts(takes_leaps=True),
    "unipc": SolverFacts(multistep=True),
    "ancestral": SolverFacts(stochastic=True, keys=("eta",)),
    "flow_sde": SolverFacts(stochastic=True, keys=("eta",)),
}
"""Solvers that a config can name; prfl/rollout/solvers.py has their functions under the same names."""

if TYPE_CHECKING:
    SolverName = str
else:
    SolverName = Literal[*SOLVERS]


class RolloutConfig(Section):
    solver: SolverName = Field(
        default="euler",
        description="euler, unipc (Wan's own), or one of the stochastic solvers ancestral and flow_sde. "
        "Stochastic solvers are for training: samples are then drawn with euler.",
    )
    eta: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="Noise of a stochastic solver: 0.7 is Flow-GRPO's; near 0 it is like euler.",
    )
    steps: int = Field(
        ge=1,
        description="Steps of the chain from noise to video. Training rolls the chain out, so the cost "
        "grows with them.",
    )
    shift: float | None = Field(default=None, gt=0, description="Shift of the sigmas; null is the backbone's own.")
    guidance: GuidanceConfig = Field(default=GuidanceConfig(), description="Classifier-free guidance in training.")
    stride: int = Field(
        default=1,
        ge=1,
        description="Steps that the rollout crosses with one network call on its way to a trained step; trained steps "
        "are taken one by one.",
    )
    gradients_per_rollout: int = Field(
        default=1,
        ge=1,
        description="Optimizer steps that share one rollout's latents; each trains its own steps of the chain.",
    )
    drift_limit: float | None = Field(
        default=0.1,
        gt=0,
        description="For gradients_per_rollout: how far the trained steps of the present policy may differ "
        "from those of the stored rollout, relative to the steps' length, before a new rollout "
        "is drawn. null sets no limit.",
    )
    cheaper: CheaperConfig = Field(
        default=CheaperConfig(), description="Approximations that make the rollout's steps without gradient cheaper."
    )
    step_weight: Literal["native", "unit"] = Field(
        default="native",
        description="unit gives the gradients of all steps the same weight: step i's is scaled by mean |B| / "
        "|B[i]|, where B[i] is the velocity's factor in step i. native leaves them as they are.",
    )

    @property
    def solver_facts(self) -> SolverFacts:
        return SOLVERS[self.solver]

    @property
    def sampling_solver(self) -> str:
        """The solver that draws videos: that of the training, or Euler if the training's solver is stochastic."""
        return "euler" if self.solver_facts.stochastic else self.solver

    def conflicts(self, config: Config) -> Iterator[Fault]:
        if (self.guidance.gradient == "none") == guided(self.guidance.scale):
            yield (
                "rollout.guidance",
                "gradient: none goes with scale: 1; a larger scale needs gradient: cond or both",
            )
        yield from first_frame_faults("rollout.guidance.first_frame", self.guidance.first_frame, self.guidance.scale)
        others = dict.fromkeys(key for facts in SOLVERS.values() for key in facts.keys)
        unused = [key for key in others if key not in self.solver_facts.keys]
        yield from unread(self, "rollout", unused, f"solver {self.solver}")
        if not config.follows_reward:
            if self.solver_facts.stochastic:
                drawn = " or ".join(name for name, facts in SOLVERS.items() if not facts.stochastic)
                yield "rollout.solver", f"objective {config.objective.name} rolls no chain out; take {drawn}"
            keys = ["guidance", "step_weight", "stride", "gradients_per_rollout", "drift_limit", "cheaper"]
            yield from unread(self, "rollout", keys, f"objective {config.objective.name}")
        elif self.gradients_per_rollout == 1:
            yield from unread(self, "rollout", ["drift_limit"], "gradients_per_rollout: 1")
