"""Measuring: metrics with intervals over prompts, judges, samples, rewards by noise level, policies, the report."""

from prfl.evaluation.judge import Judge as Judge
from prfl.evaluation.policy_eval import Outcome as Outcome
from prfl.evaluation.policy_eval import measure as measure
from prfl.evaluation.report import write_report as write_report
from prfl.evaluation.reward_eval import evaluate as evaluate
from prfl.evaluation.reward_eval import held_out as held_out
from prfl.evaluation.reward_eval import pixel_scorer as pixel_scorer
from prfl.evaluation.sampling import SamplingSettings as SamplingSettings
from prfl.evaluation.sampling import decode_all as decode_all
from prfl.evaluation.sampling import sample as sample
