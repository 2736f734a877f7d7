"""Videos of a trained policy, for a person to look at."""

from __future__ import annotations

from typing import Literal

from prfl.config.schema import Config
from prfl.evaluation import policy_eval, tables
from prfl.evaluation.media import browser_mp4, grid
from prfl.evaluation.report import write_samples_page
from prfl.factory.backbone import build_backbone, policy_adapter_name
from prfl.factory.data import encode_prompts
from prfl.factory.policy import load_policy, moment_of
from prfl.factory.prompts import load_prompts
from prfl.runs.outcomes import outcome_of
from prfl.utils.console import console, progress
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write
from prfl.utils.lock import folder_lock


def sample(config: Config, *, compare_base: bool = False) -> None:
    """Draw the trained policy's videos of the validation prompts, or of the training prompts where there are none.

    Writes samples/sampled below the run: one mp4 a video, all of them in grid.mp4, and index.html with everything.
    """
    if config.trains_reward:
        fix = "give the config of a policy; --per-prompt 4 draws the base's videos, for people to compare"
        raise PrflError("this config trains a reward, which draws no videos", where="objective.name", fix=fix)
    if compare_base and not policy_adapter_name(config):
        fix = "leave --compare-base out; sample the base's own config for its videos"
        raise PrflError("all weights were trained in place: there is no base left", where="backbone.train", fix=fix)
    with folder_lock(config.run):
        sample_in_run(config, compare_base)


def sample_in_run(config: Config, compare_base: bool) -> None:
    model = build_backbone(config)
    load_policy(config, model)
    splits = load_prompts(config.data.prompts)
    prompts = (splits.get("validation") or splits["train"])[: config.evaluation.prompts_per_round]
    encode_prompts(config, model, prompts, progress("encoding the prompts"))

    names: list[Literal["base", "policy"]] = ["base", "policy"] if compare_base else ["policy"]
    per_prompt = config.evaluation.samples_per_prompt
    outcomes = []
    for name in names:
        bar = progress(f"sampling: {name}")
        outcomes.append(
            outcome_of(config, model, {}, prompts, per_prompt, name, keep_videos=len(prompts), progress=bar)
        )

    # The videos, all of them in one grid, and a page.
    folder = config.run / "samples" / "sampled"
    path = policy_eval.write_results(folder, outcomes, config.data.fps, moment_of(config))
    groups = list(zip(*(outcome.pixels for outcome in outcomes), strict=True))
    with atomic_write(path.with_name("grid.mp4")) as temporary:
        temporary.write_bytes(browser_mp4(grid(groups), config.data.fps))
    console.print(tables.policy_table(outcomes))
    page = write_samples_page(path, f"Samples of {config.run.resolve().name}")
    console.say(f"open in a browser: {page}")
