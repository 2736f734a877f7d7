"""How many latents and network outputs a step keeps, by what its method differentiates."""

from __future__ import annotations

from prfl.backbone import Backbone
from prfl.config.schema import Config
from prfl.factory.backbone import build_coefficients
from prfl.factory.objective import build_method
from prfl.objective.choice import Choice
from prfl.objective.reused_rollout import span
from prfl.rollout.plan import Plan
from prfl.rollout.solvers import Coefficients


def all_choices(config: Config, model: Backbone) -> list[Choice]:
    """Return what each step of the run differentiates: some methods draw how much that is."""
    method = build_method(config, build_coefficients(config, model))
    return [method.choose(step) for step in range(config.training.steps)]


def leads_on(plan: Plan) -> bool:
    """Return whether the gradient goes on from one trained step to an earlier one."""
    useful = plan.useful_nodes
    return any(plan.passes(k, useful) for k in plan.evaluations)


def rolled_nodes(choice: Choice, steps: int) -> set[int]:
    """Return the nodes whose latents outlive the rollout."""
    return {*choice.kept(steps, False), *choice.noised, *choice.seeds}


def latents_of(choice: Choice, steps: int, offload: bool) -> int:
    """Count the latents that are alive together: the start, those that the rollout keeps, the scored ones, their seeds.

    With offload three of the rollout's are on the device: the one in use, the next, and its end, which never leaves.
    """
    rolled = len(rolled_nodes(choice, steps))
    return 1 + (min(rolled, 3) if offload else rolled) + len(choice.seeds) - 1


def stored_rollout(config: Config, model: Backbone) -> tuple[int, int]:
    """Count what a rollout for several steps keeps of a sample, at most.

    Latents that wait in host memory; and its outputs and its end, which stay where they are made.
    """
    choices, steps = all_choices(config, model), config.rollout.gradients_per_rollout
    spans = [span(choices[first : first + steps], 1, held_edge=False) for first in range(0, len(choices), steps)]
    waiting = max(len(needs.latents - {needs.path[-1]}) for needs in spans)
    return waiting, max(len(needs.outputs) for needs in spans) + 1


def earlier_outputs(chain: Coefficients) -> int:
    """Count the network outputs that a rollout holds at most beside the one that it has just made."""
    return max(map(len, chain.b)) - 1
