"""A policy's samples drawn and measured, beside its base's: by round, at the end of a run, and on request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from prfl.backbone import Backbone
from prfl.backbone.network import park_vae
from prfl.config.schema import Config
from prfl.evaluation import policy_eval, reward_eval, tables
from prfl.evaluation.report import write_report
from prfl.factory.backbone import policy_adapter_name
from prfl.factory.evaluation import build_judge, sampling_settings
from prfl.factory.objective import drawn_prompts
from prfl.factory.policy import moment_of
from prfl.factory.prompts import load_prompts
from prfl.training.run_folder import RunFolder
from prfl.utils import processes
from prfl.utils.console import console, progress


def prompts_of(config: Config) -> list[str]:
    """List the prompts that a policy's training encodes beside its clips': of its rollouts, its rounds and its end."""
    prompts, evaluation = load_prompts(config.data), config.evaluation
    of_rollouts = drawn_prompts(config) if config.reward else []
    of_rounds = prompts.get("validation", [])[: evaluation.prompts_per_round] if evaluation.every else []
    of_the_end = prompts.get("test", [])[: evaluation.final_samples]
    return [*of_rollouts, *of_rounds, *of_the_end]


def outcome_of(
    config: Config,
    model: Backbone,
    rewards: Mapping[str, reward_eval.Scorer],
    prompts: list[str],
    per_prompt: int,
    name: Literal["base", "policy"],
    **options: Any,
) -> policy_eval.Outcome:
    """Draw ``per_prompt`` videos of each prompt and measure them.  options: of ``policy_eval.measure``."""
    outcome = policy_eval.measure(
        model,
        prompts,
        per_prompt,
        sampling_settings(config),
        name=name,
        adapter=None if name == "base" else policy_adapter_name(config),
        judge=build_judge(config.evaluation),
        rewards=rewards,
        **options,
    )
    park_vae(model)
    return outcome


def compare_base(config: Config, model: Backbone, rewards: Mapping[str, reward_eval.Scorer], run: RunFolder) -> None:
    """Draw base and policy from the same noise on the test prompts: results.json, videos, a table.

    After full fine-tuning in place the base is gone, and the policy stands alone.
    """
    test = load_prompts(config.data)["test"][: config.evaluation.final_samples]
    per_prompt = config.evaluation.final_samples // len(test)
    names: list[Literal["base", "policy"]] = ["base", "policy"] if policy_adapter_name(config) else ["policy"]
    outcomes = [
        outcome_of(config, model, rewards, test, per_prompt, name, progress=progress(f"sampling: {name}"))
        for name in names
    ]
    if processes.is_main():
        made_by = moment_of(config)
        policy_eval.write_results(run.samples / "final", outcomes, config.data.fps, made_by)
    console.print(tables.policy_table(outcomes))


def keep_report(run: Path, step: int) -> dict[str, float]:
    """Write the report of a run as far as it is, on the main process: a hook of every round."""
    if processes.is_main():
        write_report(run)
    return {}


def show_report(run: Path) -> None:
    """Write the report of a run on the main process, and print where it is."""
    if processes.is_main():
        console.say(f"report: {write_report(run)}")
    processes.wait()
