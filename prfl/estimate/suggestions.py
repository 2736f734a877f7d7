"""What would take less memory: the keys of a config that could be turned, and what the prediction says of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any, TypeVar

import torch

from prfl.config import identity
from prfl.config.rules import conflicts
from prfl.config.schema import Config
from prfl.config.section import Section
from prfl.config.sections.backbone import PolicyAdapterConfig
from prfl.config.sections.rollout import RolloutConfig
from prfl.estimate.memory import predict_memory
from prfl.estimate.tables import gib
from prfl.factory.backbone import build_architecture, choose_kernels, device_kind
from prfl.utils.errors import PrflError

LEAST = 0.01  # of the peak: what saves less is not worth a line

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Suggestion:
    """Keys to change.  overrides: as on the command line.  saves: bytes less at the predicted peak.  note: what else
    they change."""

    overrides: str
    saves: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.overrides} ({gib(self.saves)} less{'; ' if self.note else ''}{self.note})"


def suggest(config: Config) -> list[Suggestion]:
    """List what would lower the predicted peak, the most first."""
    model = build_architecture(config)
    kernels = [choice.backend for choice in choose_kernels(config, model).values()]
    peak = predict_memory(config, model).peak
    suggestions = []
    for overrides, changes, note in _candidates(config, kernels):
        other = with_keys(config, changes)
        with suppress(PrflError):  # a trained reward may refuse it: then it is none
            if list(conflicts(other)):
                continue
            saves = peak - predict_memory(other, build_architecture(other)).peak
            anew = "" if identity(other) == identity(config) else "a new run"
            suggestions.append(Suggestion(overrides, saves, "; ".join(filter(None, [note, anew]))))
    worthwhile = [suggestion for suggestion in suggestions if suggestion.saves > LEAST * peak]
    return sorted(worthwhile, key=lambda suggestion: -suggestion.saves)


def _candidates(config: Config, kernels: list[str]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield what could be changed: the overrides as text, the keys and their values, and what else they change.

    kernels: what runs each operation of the network.
    """
    backbone, data, training, rollout = config.backbone, config.data, config.training, config.rollout

    # What is kept for the backward pass, and where.
    modes = ["none", "attention", "full"]
    offloads = device_kind(config) == "cuda" and not backbone.offload  # on a CPU nothing would move
    less = ["full"] if backbone.checkpointing == "auto" else modes[modes.index(backbone.checkpointing) :]
    for mode in less:
        for offload in (False, True) if offloads and mode != "none" else (False,):
            changes: dict[str, Any] = {"backbone.checkpointing": mode} if mode != backbone.checkpointing else {}
            changes |= {"backbone.offload": True} if offload else {}
            if changes:
                yield _as_overrides(changes), changes, ""

    # How the model is computed, and what of it is trained.
    if backbone.dtype == "float32":
        yield _candidate({"backbone.dtype": "bfloat16"}, "less exact")
    if device_kind(config) == "cuda" and any(backend != "triton" for backend in kernels):
        yield _candidate({"backbone.kernels": "triton"})  # where one of them cannot run, the prediction refuses it
    if backbone.train == "full":
        lora = {"backbone.train": "lora", "backbone.adapter": PolicyAdapterConfig(rank=32, alpha=32)}
        yield "backbone.train=lora backbone.adapter='{rank: 32, alpha: 32}'", lora, "trains fewer weights"

    # Less at a time, another gradient, or a shorter video.
    if training.accumulation < training.batch:
        yield _candidate({"training.accumulation": training.batch})
    if training.batch > training.accumulation and config.reward and config.reward.batch != 1:
        yield _candidate({"reward.batch": 1})
    if rollout.guidance.gradient == "both":
        yield _candidate({"rollout.guidance.gradient": "cond"}, "another gradient")
    if rollout.gradients_per_rollout > 1:  # whose outputs stay on the device from step to step
        changes, usual = {"rollout.gradients_per_rollout": 1}, RolloutConfig.model_fields["drift_limit"].default
        changes |= {} if rollout.drift_limit == usual else {"rollout.drift_limit": usual}  # nobody reads it then
        yield _candidate(changes, "a rollout for every step, which takes longer")
    if getattr(config.objective, "frames", None) not in (None, "one"):
        yield _candidate({"objective.frames": "one"}, "scores one latent frame a step")
    if config.evaluation.batch > 1:
        yield _candidate({"evaluation.batch": 1})
    if data.encode_batch > 1:
        yield _candidate({"data.encode_batch": 1})
    shorter = (data.frames - 1) // 8 * 4 + 1  # of 4 n + 1 frames
    if shorter < data.frames:
        yield _candidate({"data.frames": shorter}, "shorter videos")


def _candidate(changes: dict[str, Any], note: str = "") -> tuple[str, dict[str, Any], str]:
    return _as_overrides(changes), changes, note


def _as_overrides(changes: dict[str, Any]) -> str:
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def with_keys(section: S, changes: dict[str, Any]) -> S:
    """Return a copy in which the keys at these yaml paths are changed."""
    update: dict[str, Any] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        update[name] = with_keys(update.get(name, getattr(section, name)), {rest: value}) if rest else value
    return section.model_copy(update=update)


def advice(config: Config) -> str:
    """Say in words what would take less memory."""
    suggestions = suggest(config)
    return "try " + "; or ".join(map(str, suggestions)) if suggestions else "try a smaller video or a smaller model"


@contextmanager
def out_of_memory(config: Config) -> Iterator[None]:
    """Turn the end of the memory, of a GPU or of the host, into a PrflError that says what would take less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        clear_frames(error.__traceback__)  # and with them the step's tensors: the prediction needs a little room
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        predicted = predict_memory(config, build_architecture(config))
        peak, phase = gib(predicted.peak), predicted.largest.name
        raise PrflError(
            f"memory ran out ({reason}); {peak} were predicted at the peak, in '{phase}'",
            where=str(config.run),
            fix=f"{advice(config)}. Where it needs no new run, this one goes on from its last checkpoint",
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: a GPU's error (CUDA's and cuBLAS's own too), or that of the CPU's allocator."""
    text = str(error)
    words = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in text for word in words)
