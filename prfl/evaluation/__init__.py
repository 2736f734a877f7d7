"""Measuring: metrics with intervals over prompts, judges, samples, rewards by noise level, policies, the report.

The names below are imported when they are first used: the metrics need nothing but torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "Judge": "judge",
    "Outcome": "policy_eval",
    "measure": "policy_eval",
    "write_report": "report",
    "evaluate": "reward_eval",
    "held_out": "reward_eval",
    "pixel_scorer": "reward_eval",
    "SamplingSettings": "sampling",
    "decode_all": "sampling",
    "sample": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prfl.evaluation' has no attribute {name!r}")
    return getattr(import_module(f"prfl.evaluation.{_HOMES[name]}"), name)
