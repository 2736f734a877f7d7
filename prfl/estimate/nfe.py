"""NFE: how often a run evaluates the network, counted from the plans that its objective will choose."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from prfl.backbone import Backbone
from prfl.backbone.cheaper import EXACT
from prfl.config.objective_schema import SteeringConfig
from prfl.config.schema import Config, EvaluationConfig, PreferenceConfig
from prfl.estimate.rewards import reads_of_a_score
from prfl.factory.backbone import build_cheaper, build_coefficients
from prfl.factory.data import load_prompts
from prfl.factory.objective import build_method
from prfl.objective.choice import Choice, exact_nodes, holds_edge, visited
from prfl.objective.reused_rollout import span
from prfl.objective.reward_gradient import Pathwise
from prfl.rollout.solvers import Coefficients

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
    objective, training = config.objective, config.training
    counts: Counter[str] = Counter()
    if isinstance(objective, SteeringConfig):
        counts = _steering(config, objective, model)
        if objective.sft:
            counts[GRADIENT] += math.ceil(training.steps / objective.sft.every)
    elif isinstance(objective, PreferenceConfig):
        counts[REWARD] = training.steps * (1 if objective.loss == "bce" else 2)
    else:
        counts[GRADIENT] = training.steps
    if model.checkpointing != "none" and counts[GRADIENT]:
        counts[RECOMPUTED] = counts[GRADIENT]

    # Counted for one sample of each step; a batch has several.
    all_counts = []
    for name, count in counts.items():
        if count:
            total = count * training.batch
            all_counts.append(NfeCount(name, total / training.steps, total))

    samples = evaluation_samples(config)
    if samples:
        calls = samples * (config.evaluation.steps or config.rollout.steps)
        calls *= 2 if config.evaluation.guidance_scale != 1 else 1
        all_counts.append(NfeCount(SAMPLING, calls / training.steps, calls))
    return all_counts


def _steering(config: Config, objective: SteeringConfig, model: Backbone) -> Counter[str]:
    """Count the evaluations of one sample of each step, summed over the steps.

    What a step differentiates is a function of (seed, step), so it is known before the run.
    A rollout that serves several steps is taken to serve them all: no step's drift is above the limit.  A cheaper
    evaluation counts as a whole one: how many a step cache will skip is not known before (``rollout/cached`` tells).
    """
    coefficients = build_coefficients(config, model)
    method = build_method(config, coefficients)
    counts: Counter[str] = Counter()
    reads = reads_of_a_score(config)
    for step in range(config.training.steps):
        choice = method.choose(step)
        held = holds_edge(model, choice)

        # The rollout: of this step, of all the steps that it serves, or none.
        rough = 0
        if config.rollout.gradients_per_rollout == 1:
            rolled, rough = _rolled(choice, coefficients, held, config.rollout.stride)
        elif step % config.rollout.gradients_per_rollout == 0:
            served = [method.choose(step + later) for later in range(config.rollout.gradients_per_rollout)]
            needs = span(served, config.rollout.stride, held)
            rolled, rough = len(needs.path) - 1, len({*needs.path[:-1]} - needs.latents)
        else:  # the ends of the trained edges, to be scored
            rolled = 0 if held else len(choice.seeds)
        rough = 0 if build_cheaper(config) == EXACT else rough

        # The gradient, the reward and the distance.
        counts += _of_choice(choice, rolled - rough, rough, config)
        counts[REWARD] += reads * len(choice.seeds)
        trained = len(choice.plan.trains)
        if objective.distance_weight:
            counts += Counter({GRADIENT: trained, DISTANCE: trained})
        elif step % Pathwise.distance_every == 0:
            counts[DISTANCE] += 2 * trained
    return counts


def _rolled(choice: Choice, coefficients: Coefficients, held: bool, stride: int) -> tuple[int, int]:
    """Count the evaluations without gradient up to where the reward is read, and how many of them may be cheaper."""
    path = visited(choice, coefficients, held, stride)
    rolled, last = len(path) - 1, path[-1]
    if not held:  # clean predictions from where the rollout did not make the output
        rolled += sum(k >= last for k in choice.constants(coefficients.steps, held))
    return rolled, len({*path[:-1]} - exact_nodes(choice, path))


def _of_choice(choice: Choice, rolled: int, rough: int, config: Config) -> Counter[str]:
    """Count the evaluations of a step by kind.  rolled, rough: of the rollout, exact ones and cheaper ones."""
    guidance = config.rollout.guidance
    guided = guidance.scale != 1
    walked = len(choice.plan.recomputed)
    both = guidance.gradient == "both"
    calls = 2 if guided else 1
    counts = Counter({ROLLOUT: rolled * calls, CHEAPER: rough * calls, GRADIENT: walked * (2 if both else 1)})
    if guided and not both:
        counts[UNGUIDED] = walked
    return counts


def evaluation_samples(config: Config) -> int:
    """Count the videos that the run draws: rounds on the validation prompts, base and policy on the test prompts."""
    evaluation, steps = config.evaluation, config.training.steps
    if isinstance(config.objective, PreferenceConfig):
        return 0
    prompts = load_prompts(config.data.prompts)
    rounds = 1 + math.ceil(steps / evaluation.every) if evaluation.every else 0
    drawn = rounds * samples_of_round(evaluation, len(prompts.get("validation", [])))
    if evaluation.final_samples:
        count = len(prompts["test"][: evaluation.final_samples])
        models = 2 if config.backbone.train == "lora" else 1
        drawn += models * count * (evaluation.final_samples // count)
    return drawn


def samples_of_round(evaluation: EvaluationConfig, validation: int) -> int:
    """Count the videos of a round.  validation: the number of validation prompts."""
    return min(evaluation.prompts_per_round, validation) * evaluation.samples_per_prompt
