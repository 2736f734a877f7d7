"""The chain of a config: its sigmas, its solver, what its steps without gradient may save."""

from __future__ import annotations

from torch import Tensor

from prfl.backbone import Backbone
from prfl.backbone.cheaper import Cheaper
from prfl.backbone.guidance_scale import Scale, ScaleOfExperts, ScaleOfFrames
from prfl.config.schema import Config
from prfl.config.sections.experts import ScaleOfEach
from prfl.factory.by_name import build_by_name
from prfl.rollout.solvers import SOLVERS, SolverSchedule


def chain_shift(config: Config, model: Backbone) -> float:
    """Shift of the sigmas: the config's, or else the backbone's own."""
    return model.facts.shift if config.rollout.shift is None else config.rollout.shift


def chain_sigmas(config: Config, model: Backbone) -> Tensor:
    """The sigmas of the chain, (steps + 1,) float64, falling."""
    shape = model.latent_shape(config.data.frames, config.data.height, config.data.width)
    return model.sigmas(config.rollout.steps, shape, config.rollout.shift)


def build_schedule(config: Config, model: Backbone) -> SolverSchedule:
    """The chain that training rolls out."""
    return build_by_name(SOLVERS[config.rollout.solver], config.rollout, sigmas=chain_sigmas(config, model))


def build_scale(scale: float | ScaleOfEach, first_frame: float | None = None) -> Scale:
    """A scale of guidance; of each expert, or from the first frame to the last, where the config says so."""
    if isinstance(scale, ScaleOfEach):
        return ScaleOfExperts(scale.high, scale.low)
    return scale if first_frame is None else ScaleOfFrames(first_frame, scale)


def build_cheaper(config: Config) -> Cheaper:
    """How the rollout's steps without gradient are computed."""
    return build_by_name(Cheaper, config.rollout.cheaper)
