"""Early stopping: the best of a run's rounds, on a measure that is not trained on, becomes its result.

The rounds are read from the run folder, and the weights of the best are a file beside them,

    best/step-000100/policy.safetensors        (or transformer/, after full fine-tuning)

so a resumed run knows what the run before it knew, and no second copy of the weights is held.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from prfl.backbone import Backbone
from prfl.config.schema import Config
from prfl.evaluation import hacking
from prfl.evaluation.policy_eval import flat, summarise
from prfl.factory.policy import load_policy, policy_path, save_policy
from prfl.factory.provenance import Moment
from prfl.training.checkpoint import list_checkpoints
from prfl.training.run_folder import RunFolder
from prfl.utils import processes
from prfl.utils.console import console, warn
from prfl.utils.errors import PrflError
from prfl.utils.metrics_file import measure_name, validation_names

Round = tuple[int, float]  # (step, the measure there)
WATCHED = ("validation/judge/", "validation/held_out/")  # what nothing is trained on


class BestPolicy:
    """Keeps the policy of the best round by ``evaluation.keep_best``, and counts the rounds since then."""

    def __init__(self, config: Config, model: Backbone, run: RunFolder, run_id: str = "") -> None:
        """Follow a run of this config and model.  run_id: a hash of the run's identity."""
        assert config.evaluation.keep_best is not None
        self.key, self.patience = config.evaluation.keep_best, config.evaluation.patience
        self.config, self.model, self.run, self.run_id = config, model, run, run_id
        self.best, self.rounds_since, self.step = (0, -math.inf), 0, 0

    def after_round(self, step: int) -> dict[str, float]:
        """Compare the round with the ones before, on every process, once its results are in the run folder.

        Returns numbers to log.  Raises PrflError where the round has no such measure.
        """
        local = self._compare(step) if processes.is_main() else None
        of_main = processes.gather(local)[0]
        assert of_main is not None
        self.step, (self.best, self.rounds_since) = step, of_main
        return {"kept/step": float(self.best[0]), f"kept/{measure_name(self.key)}": self.best[1]}

    def _compare(self, step: int) -> tuple[Round, int]:
        """Return the best round up to this one, whose weights it keeps, and the number of rounds since."""
        rounds = self._rounds(step)
        best = best_round([r for r in rounds if r[0] == step or self._weights(r[0]).exists()])
        since = sum(number > best[0] for number, _ in rounds)
        if best[0] == step:
            moment = Moment(step, step, self.run_id)
            save_policy(self._weights(step).parent, self.model, self.config, moment)
        self._tidy(rounds, best)
        verdict = "the best round so far" if best[0] == step else f"not better than step {best[0]}, rounds ago: {since}"
        console.say(f"{self.key} {rounds[-1][1]:.4g} at step {step}: {verdict}")
        return best, since

    def _rounds(self, step: int) -> list[Round]:
        """Read the measure of each round up to this one.  Raises PrflError where this one has none."""
        rounds = []
        for number, outcome in hacking.rounds(self.run.samples, step):
            measured = validation_names(flat(summarise(outcome)))
            if self.key in measured:  # else it was measured before evaluation.judge or held_out_reward was given
                rounds.append((number, measured[self.key]))
            elif number == step:
                raise PrflError(
                    f"no round records {self.key}",
                    where="evaluation.keep_best",
                    fix=f"take one of {', '.join(key for key in measured if key.startswith(WATCHED))}",
                )
        return rounds

    def _weights(self, step: int) -> Path:
        return policy_path(self.config, self.run.path / "best" / f"step-{step:06d}")

    def _tidy(self, rounds: Sequence[Round], best: Round) -> None:
        """Remove weights that nobody asks for again.

        Those of the best round stay, and those of what was the best round at each checkpoint that the run may go on
        from.
        """
        with_weights = [r for r in rounds if self._weights(r[0]).exists()]
        needed = {best[0]}
        for checkpoint in list_checkpoints(self.run.checkpoints):
            before = [r for r in with_weights if r[0] <= int(checkpoint.name.removeprefix("step-"))]
            needed |= {best_round(before)[0]} if before else set()
        for folder in self._weights(0).parents[1].iterdir():
            if folder.name not in {f"step-{step:06d}" for step in needed}:
                shutil.rmtree(folder)

    def patience_is_over(self) -> bool:
        """Return whether there were ``evaluation.patience`` rounds without a better one."""
        return self.patience is not None and self.rounds_since >= self.patience

    def restore(self) -> None:
        """Put the weights of the best round into the model."""
        step, value = self.best
        if self.patience_is_over():
            text = f"ended at step {self.step}: {self.rounds_since} rounds without a better {self.key}"
            console.say(text)
        if step != self.step:
            load_policy(self.config, self.model, self._weights(step))
        console.say(f"kept: the policy of step {step}, {self.key} {value:.4g}")
        if step == 0:
            warn("no round was better than the base: what is kept is the base")


def best_round(rounds: Sequence[Round]) -> Round:
    """Return the round with the largest measure, of equal ones the earliest; a NaN is worse than any number."""
    return max(rounds, key=lambda r: -math.inf if math.isnan(r[1]) else r[1])
