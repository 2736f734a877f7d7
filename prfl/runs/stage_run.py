"""What every stage of training works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from accelerate import Accelerator

from prfl.backbone import Backbone
from prfl.backbone.experts import expert_of
from prfl.config.schema import Config
from prfl.factory.data import Dataset
from prfl.factory.resume_identity import former_input_contents
from prfl.objective import Objective
from prfl.runs.earlier import set_aside
from prfl.training.checkpoint import identity_hash
from prfl.training.learning import Watched
from prfl.training.loop import Callbacks, Resumption, TrainResult, fit
from prfl.training.regulariser import Regulariser
from prfl.training.run_folder import RunFolder


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

    def fit(self, objective: Objective, callbacks: Callbacks, regulariser: Regulariser | None = None) -> TrainResult:
        """Train an objective in this stage's folder.  callbacks: those of the stage; earlier results are put aside."""
        return fit(
            objective,
            self.config.training,
            self.folder,
            seed=self.config.seed,
            regulariser=regulariser,
            accelerator=self.accelerator,
            callbacks=replace(callbacks, set_aside=partial(set_aside, self.config)),
            resumption=Resumption(self.resume, self.identity, former_input_contents(self.clips)),
            watched=self.watched,
            group_of=partial(expert_of, self.model.facts),
        )
