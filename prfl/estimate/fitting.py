"""Whether a run fits a card, and which keys to change, one after another, until it does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from prfl.backbone import Backbone
from prfl.config import identity
from prfl.config.rules import conflicts
from prfl.config.schema import Config
from prfl.estimate.fill import SHARE
from prfl.estimate.memory import Memory, predict_memory
from prfl.estimate.suggestions import LEAST, RANKS, VIDEO, Candidate, candidates
from prfl.estimate.units import GIB
from prfl.estimate.variants import Variants, with_keys
from prfl.estimate.work import CardSize
from prfl.factory.backbone import build_architecture
from prfl.utils.errors import PrflError


@dataclass(frozen=True)
class Change:
    """overrides: as on the command line.  peak: bytes, predicted, with this change and those before it."""

    overrides: str
    note: str
    peak: int
    new_run: bool


@dataclass(frozen=True)
class Fit:
    """room: bytes that a run may take of the card.  peak: bytes that it takes as it is.  changes: in their order; none
    where the run fits as it is.  after: the prediction with all of them."""

    card: CardSize
    room: int
    peak: int
    changes: tuple[Change, ...]
    after: Prediction

    @property
    def fits(self) -> bool:
        return self.after.memory.peak <= self.room


@dataclass(frozen=True)
class Prediction:
    """A config, its architecture, and the memory that was predicted of them.

    model: of ``Prediction.of`` the config's own; of one in a search it has run for other configs since.
    """

    config: Config
    model: Backbone
    memory: Memory

    @staticmethod
    def of(config: Config) -> Prediction:
        model = build_architecture(config)
        return Prediction(config, model, predict_memory(config, model))

    @property
    def always(self) -> int:
        return sum(part.bytes for part in self.memory.fixed)


def on_gpu(config: Config) -> Config:
    """The config as it is on a GPU, wherever this is."""
    return with_keys(config, {"backbone.device": "cuda"})


def fit(before: Prediction, card: CardSize) -> Fit:
    """Search greedily: of the candidates of the lowest rank, the one that saves most, until the run fits.

    What only takes longer comes first, then another method or precision, then smaller videos.  before: of a config
    ``on_gpu``.
    """
    room, state = int(SHARE * card.gib * GIB), before
    changes: list[Change] = []
    variants = Variants()
    for rank in RANKS:
        if rank == VIDEO and state.always > room:
            break  # no video is so small that the weights fit
        for candidate, after in _improvements(state, rank, room, variants):
            anew = identity(after.config) != identity(before.config)
            changes.append(Change(candidate.overrides, candidate.note, after.memory.peak, anew))
            state = after
    return Fit(card, room, before.memory.peak, tuple(changes), state)


def _improvements(
    before: Prediction, rank: int, room: int, variants: Variants
) -> Iterator[tuple[Candidate, Prediction]]:
    """Yield the changes of this rank, one upon the other, while the run does not fit and one of them helps.

    What a candidate saved when it was last tried is taken for the most that it saves now: few are predicted again.
    """
    state, saved = before, dict[str, float]()
    while state.memory.peak > room:
        left = {each.overrides: each for each in candidates(state.config, state.model) if each.rank == rank}
        best, most = None, LEAST * state.memory.peak
        for key in sorted(left, key=lambda name: -saved.get(name, math.inf)):
            if best and saved.get(key, math.inf) <= most:
                break
            after = _changed(state.config, left[key], variants)
            saved[key] = state.memory.peak - after.memory.peak if after else 0.0
            if after and saved[key] > most:
                best, most = (left[key], after), saved[key]
        if not best:
            return
        yield best
        state = best[1]


def _changed(config: Config, candidate: Candidate, variants: Variants) -> Prediction | None:
    """Return the prediction with a candidate's keys; None where the config, or its reward, refuses them."""
    other = with_keys(config, candidate.changes)
    with suppress(PrflError):
        if not list(conflicts(other)):
            run = variants.run(other)
            return Prediction(other, run.model, run.memory())
    return None
