"""What a run will cost and what it lacks, found out before it starts and without the model's weights.

The names below are imported when they are first used: counting bytes (live_bytes) needs nothing but torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prfl.forecast import tables as tables
    from prfl.forecast.fill import fill_card as fill_card
    from prfl.forecast.inputs import missing_inputs as missing_inputs
    from prfl.forecast.knobs import out_of_memory as out_of_memory
    from prfl.forecast.memory import Memory as Memory
    from prfl.forecast.memory import predict_memory as predict_memory
    from prfl.forecast.work import Work as Work
    from prfl.forecast.work import count_work as count_work

_HOMES = {
    "fill_card": "fill",
    "missing_inputs": "inputs",
    "out_of_memory": "knobs",
    "Memory": "memory",
    "predict_memory": "memory",
    "Work": "work",
    "count_work": "work",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prfl.forecast' has no attribute {name!r}")
    return getattr(import_module(f"prfl.forecast.{_HOMES[name]}"), name)
