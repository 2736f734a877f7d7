"""``rollout``: the sampling chain that training rolls out, and what is asked of its solver."""

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
        description="none: no guidance. cond: gradient through the conditional branch alone. both: gradient "
        "through both branches.",
    )


class CheaperConfig(Section):
    """``rollout.cheaper``: for the steps on the way to the trained ones, which stay exact."""

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
        description="Skip all blocks but the first if the first block's residual has changed by less than "
        "this share since they last ran, for each sample by itself. 0 is never; the metric "
        "rollout/cached says how often.",
    )


@dataclass(frozen=True)
class SolverFacts:
    """What the rest of prfl asks of a solver.

    stochastic: its steps add noise.  multistep: they contain outputs from before them.  takes_leaps: it can go over
    several steps at once.  keys: of the rollout section that no other solver reads.
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
"""Solvers that a config can name; rollout/solvers.py has their functions under the same names."""

if TYPE_CHECKING:
    SolverName = str
else:
    SolverName = Literal[*SOLVERS]


class RolloutConfig(Section):
    solver: SolverName = Field(
        default="euler",
        description="euler, unipc (Wan's own), or, for training, the stochastic ancestral or flow_sde; "
        "samples are then drawn with euler.",
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
        description="Steps that the rollout takes in one leap on its way to a trained step; trained steps stay single.",
    )
    gradients_per_rollout: int = Field(
        default=1,
        ge=1,
        description="Optimizer steps that share one rollout's latents; each trains its own steps of the chain.",
    )
    drift_limit: float | None = Field(
        default=0.1,
        gt=0,
        description="For gradients_per_rollout: how far the policy's trained steps may drift from those of "
        "the rollout, relative to their length, before a new rollout is drawn; null is any "
        "distance.",
    )
    cheaper: CheaperConfig = Field(
        default=CheaperConfig(), description="How the rollout's steps without gradient may save work."
    )
    step_weight: Literal["native", "unit"] = Field(
        default="native",
        description="unit makes the gradients of all steps weigh alike (step i's is scaled by mean |B| / "
        "|B[i]|); native leaves them as they are.",
    )

    @property
    def solver_facts(self) -> SolverFacts:
        return SOLVERS[self.solver]

    @property
    def sampling_solver(self) -> str:
        """What videos are drawn with: the solver of the training, or Euler where its noise only explores."""
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
