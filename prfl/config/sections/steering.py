"""``steering``: how ``prfl sample`` selects among several chains of a video, or guides them, while they are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from prfl.config.section import Fault, Section, Share, Source, place, unread
from prfl.config.sections.rollout import SOLVERS, SolverName

if TYPE_CHECKING:
    from prfl.config.schema import Config

StepShare = Annotated[float, Field(gt=0, le=1)]
Level = Annotated[float, Field(gt=0, lt=1)]


class SteeringRewardConfig(Section):
    path: str = place(description="A trained reward: a folder, a hub id, or 'shapes'. A pixel reward needs decoding.")
    weight: float = Field(default=1.0, description="Weight of its score in the sum over the rewards.")
    weights: dict[str, float] | None = Field(
        default=None, min_length=1, description="Weight of each dimension; one that is not named does not count."
    )
    aggregate: Literal["sum", "logsigmoid"] = Field(
        default="sum", description="Weighted sum of the scores, or of the log-probabilities of good labels."
    )


class SteeringBase(Section):
    """What all steering methods have in common.

    A subclass that defines ``name`` as a Literal can be chosen in a config; there is no other list of methods.
    """

    name: str = Field(description="The method.")
    chains: int = Field(default=8, ge=1, description="Chains that are drawn of one video.")
    keep: int = Field(default=1, ge=1, description="How many of the chains are finished and written as videos.")
    budget: float | None = Field(
        default=None,
        gt=0,
        description="Network calls for one video, in place of chains: as many chains are drawn as the calls allow.",
    )
    rewards: list[SteeringRewardConfig] | None = Field(
        default=None,
        min_length=1,
        description="The rewards that compare chains; null is the reward that the config trains or follows.",
    )
    solver: SolverName | None = Field(
        default=None,
        description="Solver of the chains; null is the evaluation's, or ancestral if the method needs noise.",
    )
    eta: float = Field(default=1.0, gt=0, le=1, description="Noise of a stochastic solver.")
    final_levels: list[Level] = Field(
        default=[],
        description="Noise levels to which finished chains are noised again before latent rewards score "
        "them; the score is the mean over the levels. Empty scores the clean latents.",
    )

    needs_noise: ClassVar[bool] = False  # whether copies of one chain must diverge, which needs a stochastic solver

    @property
    def chosen_solver(self) -> str | None:
        """The solver of the chains; None is the evaluation's solver."""
        return self.solver or ("ancestral" if self.needs_noise else None)

    @property
    def follows_gradient(self) -> bool:
        """Whether the method needs the gradient of its rewards."""
        return False

    @property
    def looks_at_the_end(self) -> bool:
        """Whether the rewards score finished chains."""
        return True

    def files(self) -> list[Source]:
        return [
            Source(f"steering.rewards[{number}].path", reward.path, "reward")
            for number, reward in enumerate(self.rewards or [])
        ]

    def conflicts(self, config: Config) -> Iterator[Fault]:
        if self.budget is None and self.keep > self.chains:
            yield "steering.keep", f"there are only {self.chains} chains"
        if self.budget is not None:
            yield from unread(self, "steering", ["chains"], "a budget")
        facts = SOLVERS.get(self.chosen_solver or "")
        if self.needs_noise and self.solver and not SOLVERS[self.solver].stochastic:
            drawn = " or ".join(name for name, solver in SOLVERS.items() if solver.stochastic)
            yield "steering.solver", f"{self.name} chooses among noises, and {self.solver} adds none; take {drawn}"
        if facts is None or not facts.stochastic:
            yield from unread(self, "steering", ["eta"], "a solver without noise")
        if not self.looks_at_the_end:
            yield from unread(self, "steering", ["final_levels"], f"{self.name}, whose last look is before the end,")
        if self.rewards is None and not (config.trains_reward or config.follows_reward):
            yield "steering.rewards", f"objective {config.objective.name} has no reward to look at; name one"


class BestOfConfig(SteeringBase):
    name: Literal["best_of"] = Field(description="Chains are compared on the way, and only the best go on.")
    decide_at: list[StepShare] = Field(
        default=[0.75],
        min_length=1,
        description="Points at which chains are compared and the worst are dropped, as shares of the chain's "
        "steps, ascending; 1 is the end.",
    )

    @property
    def looks_at_the_end(self) -> bool:
        return self.decide_at[-1] == 1

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        if self.decide_at != sorted(set(self.decide_at)):
            yield "steering.decide_at", "let them ascend, each once"


STRENGTH = Field(
    default=1.0,
    ge=0,
    description="Videos are drawn with exp(strength * score) times their probability under the model.",
)


class SvddConfig(SteeringBase):
    name: Literal["svdd"] = Field(
        description="Each step tries several next states, and draws one of them by its score."
    )
    chains: int = Field(default=8, ge=1, description="Next states of a chain that each choice tries.")
    strength: float = STRENGTH
    every: int = Field(default=1, ge=1, description="Steps between two choices.")
    greedy: bool = Field(
        default=False,
        description="Take the next state with the highest score instead of drawing one; this over-optimises.",
    )

    needs_noise = True


class FkConfig(SteeringBase):
    name: Literal["fk"] = Field(description="Chains are resampled by their scores on the way (Feynman-Kac).")
    strength: float = STRENGTH
    potential: Literal["difference", "max", "sum"] = Field(
        default="difference",
        description="Which part of a chain's scores so far gives its weight: the last difference, their "
        "maximum, or their sum.",
    )
    every: int = Field(default=4, ge=1, description="Steps between two looks.")

    needs_noise = True


class BeamSearchConfig(SteeringBase):
    name: Literal["dlbs"] = Field(
        description="Beam search: each beam tries several next states, and the best of all go on."
    )
    chains: int = Field(default=8, ge=1, description="Number of beams of one video.")
    children: int = Field(default=2, ge=1, description="Next states of each beam.")
    every: int = Field(default=4, ge=1, description="Steps between two selections.")
    lookahead: int = Field(
        default=0, ge=0, description="A state is judged this many plain steps ahead; 0 judges the state itself."
    )

    needs_noise = True


class GuidedSamplingConfig(SteeringBase):
    name: Literal["guidance"] = Field(description="The reward's gradient is added to each step of the chain.")
    chains: int = Field(default=1, ge=1, description="Guided chains of a video, the best of which are kept.")
    strength: float = STRENGTH
    latest: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.95,
        description="The gradient's factor sigma / (1 - sigma) grows without bound near sigma 1; above this "
        "sigma it stays constant.",
    )
    longest: float = Field(
        default=1.0, gt=0, description="Longest push by the gradient, relative to the velocity's length."
    )
    from_step: Share = Field(default=0.0, description="Where the gradient begins to act, as a share of the steps.")
    to_step: StepShare = Field(default=1.0, description="Where the gradient stops acting, as a share of the steps.")

    @property
    def follows_gradient(self) -> bool:
        return True

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        if self.from_step >= self.to_step:
            yield "steering.from_step", f"the gradient ends at {self.to_step:g} already"


class TreeSearchConfig(SteeringBase):
    name: Literal["dts"] = Field(description="A tree of chains; rewards decide where it grows.")
    chains: int = Field(default=8, ge=1, description="Most steps that the tree of one video may cost, in whole chains.")
    strength: float = STRENGTH
    width: int = Field(default=3, ge=1, description="Next states that a node of the tree may have.")
    every: int = Field(default=5, ge=1, description="Steps between a node of the tree and its children.")
    greedy: bool = Field(
        default=False, description="Search for the video with the best score (DTS*) instead of drawing by score."
    )

    needs_noise = True


class LatSearchConfig(SteeringBase):
    name: Literal["latsearch"] = Field(description="Chains begin close together, and are resampled by their scores.")
    chains: int = Field(default=6, ge=1, description="Chains that are drawn of one video.")
    spread: Share = Field(
        default=0.1, description="How far apart the chains begin: 0 is at one point, 1 is as far as independent noises."
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Temperature of the weights softmax(score / temperature)."
    )
    look_at: list[StepShare] = Field(
        default=[0.2, 0.3, 0.4],
        min_length=1,
        description="Points at which the chains are scored, as shares of the steps, ascending.",
    )

    @property
    def looks_at_the_end(self) -> bool:
        return self.look_at[-1] == 1

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        if self.look_at != sorted(set(self.look_at)):
            yield "steering.look_at", "let them ascend, each once"


class DoitConfig(SteeringBase):
    name: Literal["doit"] = Field(
        description="Short rollouts from a step decide how the chain is corrected; no gradient is needed."
    )
    chains: int = Field(default=4, ge=1, description="Rollouts at each corrected step.")
    strength: float = STRENGTH
    every: int = Field(default=2, ge=1, description="Steps between two corrections.")
    rollout_steps: int = Field(default=2, ge=2, description="Steps of a rollout, from the corrected step to the end.")
    longest: float = Field(
        default=1.0, gt=0, description="Longest push by the gradient, relative to the velocity's length."
    )


class NoiseSearchConfig(SteeringBase):
    name: Literal["noise"] = Field(
        description="The mean of the starting noise moves, in rounds, towards noise whose videos score well."
    )
    chains: int = Field(default=4, ge=1, description="Chains of a round.")
    rounds: int = Field(default=3, ge=1, description="Rounds; the best chains of the last one are finished.")
    look_at: StepShare = Field(
        default=0.5, description="Point at which a round's chains are scored, as a share of the steps."
    )
    rate: float = Field(
        default=1.0,
        ge=0,
        description="How far the mean moves in a round; with gradient, how far each chain's start moves.",
    )
    gradient: bool = Field(
        default=False, description="Instead of the mean, move each chain's start along the reward's gradient."
    )

    @property
    def follows_gradient(self) -> bool:
        return self.gradient

    @property
    def looks_at_the_end(self) -> bool:
        return self.look_at == 1
