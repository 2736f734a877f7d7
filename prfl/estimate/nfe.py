"""NFE: how often a run evaluates the network, counted from the plans that its objective will choose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from prfl.backbone import Backbone
from prfl.backbone.cheaper import EXACT
from prfl.backbone.guidance_scale import branches_at
from prfl.config.schema import Config
from prfl.config.sections.evaluation import EvaluationConfig
from prfl.config.sections.reward_gradient import RewardGradientConfig
from prfl.estimate.rewards import reads_of_a_score
from prfl.factory.backbone import POLICY
from prfl.factory.evaluation import sampling_settings
from prfl.factory.objective import build_method
from prfl.factory.prompts import load_prompts
from prfl.factory.rollout import build_cheaper, build_scale, build_schedule
from prfl.objective.distance import shares_call
from prfl.objective.methods.of_experts import sigma_of
from prfl.objective.reward_gradient import RewardGradient, retains_graph
from prfl.rollout.plan import Evaluated, StepPlan
from prfl.rollout.requirements import requirements

ROLLOUT = "rollout forwards"
CHEAPER = "rollout forwards, cheaper"
GRADIENT = "gradient forwards and backwards"
RECOMPUTED = "forwards again, for checkpointed blocks"
UNGUIDED = "forwards without a prompt, for guidance"
REWARD = "reward forwards"
DISTANCE = "forwards for the distance to the base"
SAMPLING = "forwards for evaluation samples"


@dataclass(frozen=True)
class NfeCount:
    """One kind of network evaluation, in evaluations of one sample.  per_step: mean over the optimizer steps."""

    name: str
    per_step: float
    total: int


def count_nfe(config: Config, model: Backbone) -> list[NfeCount]:
    """Count the network evaluations of the whole run.

    model: gives the shift and the checkpointing; it may be on ``meta``.
    """
    training = config.training
    counts: Counter[str] = Counter()
    if objective := config.reward_gradient:
        counts = _reward_gradient(config, objective, model)
        if objective.sft:
            counts[GRADIENT] += math.ceil(training.steps / objective.sft.every)
    elif preference := config.preference:
        counts[REWARD] = training.steps * preference.samples_compared
    else:
        counts[GRADIENT] = training.steps
    if model.running.checkpointing != "none" and counts[GRADIENT]:
        counts[RECOMPUTED] = counts[GRADIENT]

    # Counted for one sample of each step; a batch has several.
    all_counts = []
    for name, count in counts.items():
        if count:
            total = count * training.batch
            all_counts.append(NfeCount(name, total / training.steps, total))

    samples = evaluation_samples(config)
    if samples:
        calls = samples * calls_of_a_sample(config, model)
        all_counts.append(NfeCount(SAMPLING, calls / training.steps, calls))
    return all_counts


def _reward_gradient(config: Config, objective: RewardGradientConfig, model: Backbone) -> Counter[str]:
    """Count the evaluations of one sample of each step, summed over the steps: plans are functions of (seed, step).

    What a step differentiates is a function of (seed, step), so it is known before the run.
    A rollout that serves several steps is taken to serve them all: no step's drift is above the limit.  A cheaper
    evaluation counts as a whole one: how many a step cache will skip is not known before (``rollout/cached`` tells).
    """
    schedule = build_schedule(config, model)
    method, rollout = build_method(config, model), config.rollout
    served = rollout.gradients_per_rollout
    counts: Counter[str] = Counter()
    reads = reads_of_a_score(config)

    scale = build_scale(rollout.guidance.scale, rollout.guidance.first_frame)

    def branches(k: Evaluated) -> int:
        return branches_at(model.facts, scale, sigma_of(schedule, k))

    for step in range(config.training.steps):
        step_plan = method.plan(step)
        retained = retains_graph(model, step_plan)

        # Up to where the reward is read, without gradient.
        ends = frozenset() if retained else frozenset(edge.source for edge in step_plan.scored_edges)
        calls, cheap = ends, frozenset[Evaluated]()  # the ends of the trained edges of a stored rollout
        if step % served == 0:
            plans = [method.plan(later) for later in range(step, step + served)]
            needs = requirements(plans, schedule, rollout.stride, retained, reused=served > 1)
            calls, cheap = needs.calls, frozenset() if build_cheaper(config) == EXACT else needs.cheaper_calls
        counts += _of_plan(step_plan, calls - cheap, cheap, branches, rollout.guidance.gradient == "both")
        counts[REWARD] += reads * len(step_plan.seeds)

        trained = len(step_plan.plan.trains)
        if objective.distance_weight:
            counts[DISTANCE] += trained
            counts[GRADIENT] += 0 if shares_call(model, POLICY, step_plan, scale) else trained
        elif step % RewardGradient.distance_every == 0:
            counts[DISTANCE] += 2 * trained
    return counts


def _of_plan(
    step_plan: StepPlan,
    calls: Collection[Evaluated],
    cheap: Collection[Evaluated],
    branches: Callable[[Evaluated], int],
    both: bool,
) -> Counter[str]:
    """Count the evaluations of a step by kind.

    calls, cheap: those without gradient, exact and cheaper ones.  branches: the network calls of each.
    both: whether both branches of guidance have gradient.
    """
    without = {ROLLOUT: sum(map(branches, calls)), CHEAPER: sum(map(branches, cheap))}
    recomputed = step_plan.plan.recomputed
    of_gradient = sum(map(branches, recomputed))
    if both:
        return Counter({**without, GRADIENT: of_gradient})
    return Counter({**without, GRADIENT: len(recomputed), UNGUIDED: of_gradient - len(recomputed)})


def calls_of_a_sample(config: Config, model: Backbone) -> int:
    """The network calls of a video that is drawn for evaluation."""
    settings = sampling_settings(config)
    shape = model.latent_shape(settings.frames, settings.height, settings.width)
    nodes = settings.chain(model, shape).sigmas[:-1]
    return sum(branches_at(model.facts, settings.guidance_scale, float(sigma)) for sigma in nodes)


def evaluation_samples(config: Config) -> int:
    """Count the videos that the run draws: rounds on the validation prompts, base and policy on the test prompts."""
    evaluation, steps = config.evaluation, config.training.steps
    if config.trains_reward:
        return 0
    rounds = 1 + math.ceil(steps / evaluation.every) if evaluation.every else 0
    prompts = load_prompts(config.data)
    drawn = rounds * samples_of_round(evaluation, len(prompts.get("validation", [])))
    if evaluation.final_samples:
        count = len(prompts["test"][: evaluation.final_samples])
        models = 2 if config.backbone.train == "lora" else 1
        drawn += models * count * (evaluation.final_samples // count)
    return drawn


def samples_of_round(evaluation: EvaluationConfig, validation: int) -> int:
    """Count the videos of a round.  validation: the number of validation prompts."""
    return min(evaluation.prompts_per_round, validation) * evaluation.samples_per_prompt
