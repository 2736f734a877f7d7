"""The callbacks of a policy's training: rounds of validation, and the end of a run that hacks its reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from prfl.evaluation import hacking, policy_eval, reward_eval
from prfl.factory.policy import policy_path, save_policy
from prfl.factory.prompts import load_prompts
from prfl.factory.provenance import Moment, run_hash
from prfl.runs.early_stopping import BestPolicy
from prfl.runs.outcomes import outcome_of, show_report
from prfl.runs.stage_run import StageRun
from prfl.utils import processes
from prfl.utils.console import warn
from prfl.utils.errors import GuardError


class Validation:
    """Samples of the validation prompts, round by round: measured, kept in the run folder, compared with the earlier.

    ``alarms`` says, on every process, by what the latest round looks like reward hacking.
    """

    def __init__(self, stage: StageRun, rewards: Mapping[str, reward_eval.Scorer], best: BestPolicy | None) -> None:
        evaluation = stage.config.evaluation
        self.stage, self.rewards, self.best = stage, rewards, best
        self.prompts = load_prompts(stage.config.data)["validation"][: evaluation.prompts_per_round]
        self.alarms: list[hacking.HackingAlarm] = []

    def __call__(self, step: int) -> dict[str, float]:
        config, samples = self.stage.config, self.stage.folder.samples
        per_prompt = config.evaluation.samples_per_prompt
        outcome = outcome_of(config, self.stage.model, self.rewards, self.prompts, per_prompt, "policy")

        # The main process writes the round and compares it with those before; all of them hear what it says.
        if processes.is_main():
            made_by = asdict(Moment(step, step, self.stage.run_id))
            policy_eval.write_results(samples / f"step-{step:06d}", [outcome], config.data.fps, made_by)
            self.alarms = hacking.find_alarms(hacking.rounds(samples, step))
            for alarm in self.alarms:
                warn(f"reward hacking? {alarm}")
        self.alarms = processes.gather(self.alarms)[0]

        metrics = policy_eval.flat(policy_eval.summarise(outcome)) | {"hacking": float(len(self.alarms))}
        return metrics | (self.best.after_round(step) if self.best else {})


class StopOnHacking:
    """Ends the run, its result saved, at the first round that looks like reward hacking."""

    def __init__(self, stage: StageRun, validation: Validation) -> None:
        self.stage, self.validation = stage, validation

    def __call__(self, step: int) -> dict[str, float]:
        """Raises GuardError with the alarms, and with the policy to take."""
        alarms, best, folder = self.validation.alarms, self.validation.best, self.stage.folder
        if not alarms:
            return {}

        better = "train with a lower learning rate, objective.sft or objective.distance_weight, or a better reward; "
        if best:  # this is the end of the run, and its best round is known
            save_best(self.stage, best, step)
            path = policy_path(self.stage.config, folder.path)
            fix = f"{path} is the policy of step {best.best[0]}, the best round by {best.key}; to have more, "
            fix += better + "or evaluation.stop_on_hacking=false"
        else:
            fix = f"take a checkpoint of step {alarms[0].since} or soon after; {better}or "
            fix += "evaluation.stop_on_hacking=false, with evaluation.keep_best to have the best round"
        show_report(folder.path)
        what = f"reward hacking at step {step}: {'; '.join(map(str, alarms))}"
        raise GuardError(what, where=str(folder.samples), fix=fix)


def save_best(stage: StageRun, best: BestPolicy | None, step: int) -> None:
    """Write the run's result: the policy of its best round, where one is kept, else the present one."""
    if best:
        best.restore()
    if processes.is_main():
        made_by = run_hash(stage.folder.path, stage.run_id)
        moment = Moment(best.best[0] if best else step, step, made_by)
        save_policy(stage.folder.path, stage.model, stage.config, moment)
