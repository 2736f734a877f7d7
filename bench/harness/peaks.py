"""The memory of a step, phase by phase: what the dry run predicts, and the allocator's peaks beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prfl.config.schema import Config
from prfl.estimate.memory import predict_memory
from prfl.estimate.stored_latents import all_plans
from prfl.factory.backbone import build_architecture
from prfl.objective import reward_gradient
from prfl.objective.reward_gradient import retains_graph

PEAK, ROLLOUT, REWARD, BACKWARD = "peak", "rollout", "reward", "backward"
PHASES = {  # how a phase of the forecast begins: what it is called by the clock of a step
    "rollout": ROLLOUT, "decoder": REWARD, "reward": REWARD, "walk back": BACKWARD, "optimizer step": "optimizer",
}  # fmt: skip


def predicted_peaks(config: Config) -> dict[str, int]:
    """Predict the bytes at the peak of a reward-gradient step, and of each of its phases; on a GPU, whatever is here.

    The step alone: neither the text encoder before it nor an evaluation after it, which may take more.  Where the last
    edge is held, its graph is made at the end of the rollout: that is counted in whole beside what a call takes.
    """
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"device": "cuda"})})
    model = build_architecture(config)
    memory = predict_memory(config, model)
    fixed = sum(part.bytes for part in memory.fixed)
    peaks: dict[str, int] = {}
    for phase in memory.phases:
        name = next((clock_name for start, clock_name in PHASES.items() if phase.name.startswith(start)), None)
        if name is not None:
            peaks[name] = max(peaks.get(name, 0), fixed + phase.bytes)
    if any(retains_graph(model, step_plan) for step_plan in all_plans(config, model)):
        peaks[ROLLOUT] += max(phase.saved for phase in memory.phases if phase.name.startswith("walk back"))
    return {PEAK: max(peaks.values()), **peaks}


@contextmanager
def measured_peaks() -> Iterator[dict[str, int]]:
    """Measure the bytes at the peak of torch's allocator on a GPU: of all that runs within, and of each phase.

    A phase is what the clock of a reward-gradient step times, such as ``rollout``.  Complete when the context ends; the
    allocator's own peak starts anew with each phase.
    """
    peaks: dict[str, int] = {}

    def read(*names: str) -> None:
        bytes_since_reset = torch.cuda.max_memory_allocated()
        peaks.update({name: max(peaks.get(name, 0), bytes_since_reset) for name in names})

    class PeakClock(reward_gradient.Clock):
        @contextmanager
        def __call__(self, name: str) -> Iterator[None]:
            read(PEAK)  # of what lies between two phases
            torch.cuda.reset_peak_memory_stats()
            with super().__call__(name):
                yield
            read(PEAK, name)

    plain = reward_gradient.Clock
    torch.cuda.reset_peak_memory_stats()
    setattr(reward_gradient, "Clock", PeakClock)  # noqa: B010  (mypy takes no assignment to a class)
    try:
        yield peaks
    finally:
        setattr(reward_gradient, "Clock", plain)  # noqa: B010
        read(PEAK)
