"""How many latents and network outputs a step keeps, by what its method differentiates."""

from __future__ import annotations

from collections.abc import Sequence

from prfl.backbone import Backbone
from prfl.config.schema import Config
from prfl.factory.objective import build_method
from prfl.rollout.plan import Plan, StepPlan
from prfl.rollout.requirements import requirements
from prfl.rollout.solvers import SolverSchedule


def all_plans(config: Config, model: Backbone) -> list[StepPlan]:
    """Return what each step of the run differentiates: some methods draw how much that is."""
    method = build_method(config, model)
    return [method.plan(step) for step in range(config.training.steps)]


def leads_on(plan: Plan) -> bool:
    """Return whether the gradient goes on from one trained step to an earlier one."""
    useful = plan.useful_nodes
    return any(plan.passes(k, useful) for k in plan.evaluations)


def most_kept(plans: Sequence[StepPlan], schedule: SolverSchedule) -> int:
    """Count the nodes whose latents outlive a step's rollout, at most."""
    return max(len(requirements([step_plan], schedule).latents) for step_plan in plans)


def most_latents(plans: Sequence[StepPlan], schedule: SolverSchedule, offload: bool) -> int:
    """Count the latents that are alive together: the start, those that the rollout keeps, the scored ones, their seeds.

    With offload three of the rollout's are on the device: the one in use, the next, and its end, which never leaves.
    """
    alive = []
    for step_plan in plans:
        kept = len(requirements([step_plan], schedule).latents)
        alive.append(1 + (min(kept, 3) if offload else kept) + len(step_plan.seeds) - 1)
    return max(alive)


def stored_rollout(plans: Sequence[StepPlan], schedule: SolverSchedule, steps: int) -> tuple[int, int]:
    """Count what a rollout for so many steps keeps of a sample, at most.

    Latents that wait in host memory; and its outputs and its end, which stay where they are made.
    """
    waiting, outputs = [], []
    for first in range(0, len(plans), steps):
        needs = requirements(plans[first : first + steps], schedule, reused=True)
        waiting.append(len(needs.latents - {needs.path[-1]}))
        outputs.append(len(needs.outputs))
    return max(waiting), max(outputs) + 1


def earlier_outputs(chain: SolverSchedule) -> int:
    """Count the network outputs that a rollout holds at most beside the one that it has just made."""
    return max(map(len, chain.b)) - 1
