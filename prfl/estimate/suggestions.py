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
class Knob:
    """overrides: as on the command line.  saves: bytes less at the predicted peak.  note: what else it changes."""

    overrides: str
    saves: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.overrides} ({gib(self.saves)} less{'; ' if self.note else ''}{self.note})"


def knobs(config: Config) -> list[Knob]:
    """What would lower the predicted peak, the most first."""
    peak = predict_memory(config, build_architecture(config)).peak
    found = []
    for overrides, changes, note in _candidates(config):
        other = with_keys(config, changes)
        with suppress(PrflError):  # a trained reward may refuse it: then it is none
            if list(conflicts(other)):
                continue
            saves = peak - predict_memory(other, build_architecture(other)).peak
            anew = "" if identity(other) == identity(config) else "a new run"
            found.append(Knob(overrides, saves, "; ".join(filter(None, [note, anew]))))
    return sorted((knob for knob in found if knob.saves > LEAST * peak), key=lambda knob: -knob.saves)


def _candidates(config: Config) -> Iterator[tuple[str, dict[str, Any], str]]:
    own, data, training, rollout = config.backbone, config.data, config.training, config.rollout
    modes = ["none", "attention", "full"]
    offloads = device_kind(config) == "cuda" and not own.offload  # on a CPU nothing would move
    less = ["full"] if own.checkpointing == "auto" else modes[modes.index(own.checkpointing) :]
    for mode in less:
        for offload in (False, True) if offloads and mode != "none" else (False,):
            turned: dict[str, Any] = {"backbone.checkpointing": mode} if mode != own.checkpointing else {}
            turned |= {"backbone.offload": True} if offload else {}
            if turned:
                yield _written(turned), turned, ""
    if own.dtype == "float32":
        yield from _one({"backbone.dtype": "bfloat16"}, "less exact")
    if device_kind(config) == "cuda" and any(each.backend != "triton" for each in choose_kernels(config).values()):
        yield from _one({"backbone.kernels": "triton"})  # where one of them cannot run, the prediction refuses it
    if own.train == "full":
        lora = {"backbone.train": "lora", "backbone.adapter": PolicyAdapterConfig(rank=32, alpha=32)}
        yield "backbone.train=lora backbone.adapter='{rank: 32, alpha: 32}'", lora, "trains fewer weights"
    if training.accumulation < training.batch:
        yield from _one({"training.accumulation": training.batch})
    if training.batch > training.accumulation and config.reward and config.reward.batch != 1:
        yield from _one({"reward.batch": 1})
    if rollout.guidance.gradient == "both":
        yield from _one({"rollout.guidance.gradient": "cond"}, "another gradient")
    if rollout.gradients_per_rollout > 1:  # whose outputs stay on the device from step to step
        turned, usual = {"rollout.gradients_per_rollout": 1}, RolloutConfig.model_fields["drift_limit"].default
        turned |= {} if rollout.drift_limit == usual else {"rollout.drift_limit": usual}  # nobody reads it then
        yield from _one(turned, "a rollout for every step, which takes longer")
    if getattr(config.objective, "frames", None) not in (None, "one"):
        yield from _one({"objective.frames": "one"}, "scores one latent frame a step")
    if config.evaluation.batch > 1:
        yield from _one({"evaluation.batch": 1})
    if data.encode_batch > 1:
        yield from _one({"data.encode_batch": 1})
    shorter = (data.frames - 1) // 8 * 4 + 1  # of 4 n + 1 frames
    if shorter < data.frames:
        yield from _one({"data.frames": shorter}, "shorter videos")


def _one(turned: dict[str, Any], note: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    yield _written(turned), turned, note


def _written(turned: dict[str, Any]) -> str:
    return " ".join(f"{key}={str(value).lower()}" for key, value in turned.items())


def with_keys(section: S, changes: dict[str, Any]) -> S:
    """A copy in which the keys at these yaml paths are changed."""
    own: dict[str, Any] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        own[name] = with_keys(own.get(name, getattr(section, name)), {rest: value}) if rest else value
    return section.model_copy(update=own)


def advice(config: Config) -> str:
    found = knobs(config)
    return "try " + "; or ".join(map(str, found)) if found else "try a smaller video or a smaller model"


@contextmanager
def out_of_memory(config: Config) -> Iterator[None]:
    """Turns the end of the memory, of a GPU or of the host, into a PrflError that says what would take less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        clear_frames(error.__traceback__)  # and with them the step's tensors: the prediction needs a little room
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        predicted = predict_memory(config, build_architecture(config))
        raise PrflError(
            f"memory ran out ({said}); {gib(predicted.peak)} were predicted at the peak, in '{predicted.largest.name}'",
            where=str(config.run),
            fix=f"{advice(config)}. Where it needs no new run, this one goes on from its last checkpoint",
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's torch.OutOfMemoryError (CUDA's and cuBLAS's own errors too), or what the CPU's allocator raises."""
    said = str(error)
    words = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in said for word in words)
