"""Suggest changes of a config that would take less memory, with the predicted saving of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any

import torch

from prfl.backbone import Backbone
from prfl.config import identity
from prfl.config.rules import conflicts
from prfl.config.schema import Config
from prfl.config.sections.backbone import PolicyAdapterConfig
from prfl.config.sections.experts import ExpertsConfig
from prfl.config.sections.rollout import RolloutConfig
from prfl.estimate.memory import predict_memory
from prfl.estimate.units import gib
from prfl.estimate.variants import Variants, with_keys
from prfl.factory.backbone import build_architecture, choose_kernels, device_kind
from prfl.factory.experts import one_resident
from prfl.utils.errors import PrflError

LEAST = 0.01  # of the peak: what saves less is not worth a line


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
    variants = Variants()
    run = variants.run(config)
    peak = run.memory().peak
    suggestions = []
    for candidate in candidates(config, run.model):
        other = with_keys(config, candidate.changes)
        with suppress(PrflError):  # a trained reward may refuse it: then it is none
            if list(conflicts(other)):
                continue
            saves = peak - variants.run(other).memory().peak
            anew = "" if identity(other) == identity(config) else "a new run"
            note = "; ".join(filter(None, [candidate.note, anew]))
            suggestions.append(Suggestion(candidate.overrides, saves, note))
    worthwhile = [suggestion for suggestion in suggestions if suggestion.saves > LEAST * peak]
    return sorted(worthwhile, key=lambda suggestion: -suggestion.saves)


@dataclass(frozen=True)
class Candidate:
    """What could be changed.  changes: values by yaml path.  rank: what it costs (``RANKS``).  note: what else it
    changes.  overrides: as on the command line."""

    changes: dict[str, Any]
    rank: int
    note: str = ""
    text: str = ""

    @property
    def overrides(self) -> str:
        return self.text or " ".join(f"{key}={str(value).lower()}" for key, value in self.changes.items())


RANKS = TIME, METHOD, VIDEO = range(3)
"""The same numbers, later; another method, precision or code; another video."""


def fewer_experts(config: Config, model: Backbone) -> Iterator[Candidate]:
    """Yield that one expert's weights are on the GPU at a time, where they may be."""
    backbone = config.backbone
    frozen = backbone.train == "lora" and backbone.checkpointing != "none" and not backbone.compile
    if model.facts.boundary is None or not frozen or one_resident(config) or device_kind(config) == "cpu":
        return
    if backbone.experts is not None:
        yield Candidate({"backbone.experts.resident": "one"}, TIME)
    else:
        changes = {"backbone.experts": ExpertsConfig(resident="one")}
        yield Candidate(changes, TIME, text="backbone.experts='{resident: one}'")


def candidates(config: Config, model: Backbone) -> Iterator[Candidate]:
    """Yield what could be changed.  model: ``build_architecture(config)``."""
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
                yield Candidate(changes, TIME)

    yield from fewer_experts(config, model)

    # How the model is computed, and what of it is trained.
    if backbone.dtype == "float32":
        yield Candidate({"backbone.dtype": "bfloat16"}, METHOD, "less exact")
    kernels = {choice.backend for choice in choose_kernels(config, model).values()}
    if device_kind(config) == "cuda" and kernels != {"triton"}:
        # Where one of them cannot run, the prediction refuses it.
        yield Candidate({"backbone.kernels": "triton"}, METHOD, "run their tests first")
    if backbone.train == "full":
        lora = {"backbone.train": "lora", "backbone.adapter": PolicyAdapterConfig(rank=32, alpha=32)}
        text = "backbone.train=lora backbone.adapter='{rank: 32, alpha: 32}'"
        yield Candidate(lora, METHOD, "trains fewer weights", text)

    # Less at a time, another gradient, or a smaller video.
    if training.accumulation < training.batch:
        yield Candidate({"training.accumulation": training.batch}, TIME)
    if training.batch > training.accumulation and config.reward and config.reward.batch != 1:
        yield Candidate({"reward.batch": 1}, TIME)
    if rollout.guidance.gradient == "both":
        yield Candidate({"rollout.guidance.gradient": "cond"}, METHOD, "another gradient")
    if rollout.gradients_per_rollout > 1:  # whose outputs stay on the device from step to step
        changes, usual = {"rollout.gradients_per_rollout": 1}, RolloutConfig.model_fields["drift_limit"].default
        changes |= {} if rollout.drift_limit == usual else {"rollout.drift_limit": usual}  # nobody reads it then
        yield Candidate(changes, METHOD, "a rollout for every step, which takes longer")
    if getattr(config.objective, "frames", None) not in (None, "one"):
        yield Candidate({"objective.frames": "one"}, METHOD, "scores one latent frame a step")
    if config.evaluation.batch > 1:
        yield Candidate({"evaluation.batch": 1}, TIME)
    if data.encode_batch > 1:
        yield Candidate({"data.encode_batch": 1}, TIME)
    shorter = (data.frames - 1) // 8 * 4 + 1  # of 4 n + 1 frames
    if shorter < data.frames:
        yield Candidate({"data.frames": shorter}, VIDEO, "shorter videos")
    smaller = {f"data.{name}": getattr(data, name) * 2 // 3 // UNIT * UNIT for name in ("height", "width")}
    if min(smaller.values()) >= SMALLEST:
        yield Candidate(smaller, VIDEO, "smaller pictures")


UNIT, SMALLEST = 32, 256  # pixels: a multiple that every model takes; below the least, no real model draws anything


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
