"""What every stage of training works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from accelerate import Accelerator

from prfl.backbone import Backbone
from prfl.config.schema import Config
from prfl.factory.data import Dataset
from prfl.factory.resume_identity import former_input_contents
from prfl.objective import Objective
from prfl.runs.earlier import set_aside
from prfl.training.checkpoint import identity_hash
from prfl.training.learning import Watched
from prfl.training.log import RunFolder
from prfl.training.loop import TrainResult, fit


@dataclass(frozen=True)
class StageRun:
    """A stage that is about to train: its config, its model, its folder, and the clips of its data.

    identity: json-able facts that must be the same when the run is resumed.  watched: what must not change while it
    trains, and what must.
    """

    config: Config
    model: Backbone
    folder: RunFolder
    accelerator: Accelerator
    resume: str
    identity: Mapping[str, Any]
    watched: Watched
    clips: Dataset | None = None

    @cached_property
    def run_id(self) -> str:
        """A hash of the run's identity, which its results carry."""
        return identity_hash(dict(self.identity))

    def fit(self, objective: Objective, **options: Any) -> TrainResult:
        """Train an objective in this stage's folder; options: those of ``training.loop.fit`` that differ by stage."""
        return fit(
            objective,
            self.config.training,
            self.folder,
            seed=self.config.seed,
            accelerator=self.accelerator,
            resume=self.resume,
            identity=self.identity,
            former=former_input_contents(self.clips),
            set_aside=partial(set_aside, self.config),
            watched=self.watched,
            **options,
        )
