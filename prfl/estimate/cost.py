"""The cost of a run in hours on a card: its network evaluations, times the counted work of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prfl.backbone import Backbone
from prfl.config.schema import Config
from prfl.config.sections.experts import guided
from prfl.estimate import nfe
from prfl.estimate.live_tensors import fused_on_meta
from prfl.estimate.nfe import NfeCount, count_nfe, evaluation_samples
from prfl.estimate.parts import Part, Shapes
from prfl.estimate.phases import network_call
from prfl.estimate.rewards import reads_of_a_score
from prfl.estimate.work import Work
from prfl.factory.backbone import device_kind

DECODED = "evaluation samples, decoded"


@dataclass(frozen=True)
class Cost:
    """count: of one kind of evaluation.  work: of all of them; None where another row has it."""

    count: NfeCount
    work: Work | None


def count_cost(config: Config, model: Backbone, phases: Sequence[Part]) -> list[Cost]:
    """Count a run's network evaluations and their work.  Filling the cache and encoding the prompts are not in it.

    phases: as ``predict_memory(config, model)`` measured them.
    """
    counts = count_nfe(config, model)
    works = _work_of_one(config, model, counts, phases)
    if samples := evaluation_samples(config):
        counts = [*counts, NfeCount(DECODED, samples / config.training.steps, samples)]
    costs = []
    for count in counts:
        work = works[count.name]
        costs.append(Cost(count, None if work is None else work * count.total))
    return costs


def _work_of_one(
    config: Config, model: Backbone, counts: Sequence[NfeCount], phases: Sequence[Part]
) -> dict[str, Work | None]:
    """Return the work of one evaluation of each kind.

    A phase's call is of all branches of guidance, and a count of one of them; a checkpointed block's second forward is
    in the gradient's work, as it is in the code that was measured.
    """
    measured: dict[str | None, Work] = {}
    for part in phases:
        measured[part.role] = measured.get(part.role, Work()) + part.work

    guidance = config.rollout.guidance
    branches = 2 if config.follows_reward and guided(guidance.scale) else 1
    forward = measured.get("rollout", Work())
    if "rollout" not in measured and any(count.name == nfe.SAMPLING for count in counts):
        with fused_on_meta(device_kind(config)):
            forward = network_call(config, model, Shapes(model, config), 1, gradient=False).work
    forward = forward * (1 / branches)
    gradient = measured.get("gradient", Work())
    if branches == 2:
        both = guidance.gradient == "both"
        gradient = gradient * 0.5 if both else gradient + forward * -1
    reads = reads_of_a_score(config) if config.follows_reward else 1
    return {
        **dict.fromkeys((nfe.ROLLOUT, nfe.CHEAPER, nfe.UNGUIDED, nfe.DISTANCE, nfe.SAMPLING), forward),
        nfe.GRADIENT: gradient,
        nfe.RECOMPUTED: None,
        nfe.REWARD: measured.get("reward", Work()) * (1 / reads),
        DECODED: measured.get("decoder", Work()),
    }


def total_work(costs: Sequence[Cost]) -> Work:
    return sum((cost.work for cost in costs if cost.work is not None), Work())
