"""How often a run evaluates the network, counted from the plans that its objective will choose."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from prfl.backbone import Backbone
from prfl.backbone.cheaper import EXACT
from prfl.config.schema import Config
from prfl.config.sections.evaluation import EvaluationConfig
from prfl.config.sections.reward_gradient import RewardGradientConfig
from prfl.estimate.rewards import reads_of_a_score
from prfl.factory.objective import build_method
from prfl.factory.prompts import load_prompts
from prfl.factory.rollout import build_coefficients, cheaper
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
class Work:
    """One kind of network evaluation, in evaluations of one sample.  per_step: mean over the optimizer steps."""

    name: str
    per_step: float
    total: int


def count_work(config: Config, model: Backbone) -> list[Work]:
    """Everything that the whole run evaluates.  model may be on ``meta``; it gives the shift and checkpointing."""
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
    if model.checkpointing != "none" and counts[GRADIENT]:
        counts[RECOMPUTED] = counts[GRADIENT]
    works = [Work(name, n * training.batch / training.steps, n * training.batch) for name, n in counts.items() if n]
    samples = evaluation_samples(config)
    if samples:
        calls = samples * (config.evaluation.steps or config.rollout.steps)
        calls *= 2 if config.evaluation.guidance_scale != 1 else 1
        works.append(Work(SAMPLING, calls / training.steps, calls))
    return works


def _reward_gradient(config: Config, objective: RewardGradientConfig, model: Backbone) -> Counter[str]:
    """Of one sample of each step, summed over the steps: the choices are functions of (seed, step).

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
        rough = 0
        if config.rollout.gradients_per_rollout == 1:
            rolled, rough = _rolled(choice, coefficients, held, config.rollout.stride)
        elif step % config.rollout.gradients_per_rollout == 0:
            served = [method.choose(step + later) for later in range(config.rollout.gradients_per_rollout)]
            needs = span(served, config.rollout.stride, held)
            rolled, rough = len(needs.path) - 1, len({*needs.path[:-1]} - needs.latents)
        else:  # the ends of the trained edges, to be scored
            rolled = 0 if held else len(choice.seeds)
        rough = 0 if cheaper(config) == EXACT else rough
        counts += _of_choice(choice, rolled - rough, rough, config)
        counts[REWARD] += reads * len(choice.seeds)
        trained = len(choice.plan.trains)
        if objective.distance_weight:
            counts += Counter({GRADIENT: trained, DISTANCE: trained})
        elif step % Pathwise.distance_every == 0:
            counts[DISTANCE] += 2 * trained
    return counts


def _rolled(choice: Choice, coefficients: Coefficients, held: bool, stride: int) -> tuple[int, int]:
    """Evaluations without gradient up to where the reward is read, and how many of them may be cheaper."""
    path = visited(choice, coefficients, held, stride)
    rolled, last = len(path) - 1, path[-1]
    if not held:  # clean predictions from where the rollout did not make the output
        rolled += sum(k >= last for k in choice.constants(coefficients.steps, held))
    return rolled, len({*path[:-1]} - exact_nodes(choice, path))


def _of_choice(choice: Choice, rolled: int, rough: int, config: Config) -> Counter[str]:
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
    """Videos that the run draws to be looked at: base and policy on the test prompts at the end, rounds before."""
    own, steps = config.evaluation, config.training.steps
    if config.trains_reward:
        return 0
    rounds = 1 + math.ceil(steps / own.every) if own.every else 0
    known = load_prompts(config.data.prompts)
    drawn = rounds * samples_of_round(own, len(known.get("validation", [])))
    if own.final_samples:
        prompts = len(known["test"][: own.final_samples])
        both = 2 if config.backbone.train == "lora" else 1
        drawn += both * prompts * (own.final_samples // prompts)
    return drawn


def samples_of_round(own: EvaluationConfig, validation: int) -> int:
    return min(own.prompts_per_round, validation) * own.samples_per_prompt
