"""Videos of a trained policy, or of its base, for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prfl.backbone import Backbone
from prfl.backbone.condition import check_asks
from prfl.config.schema import Config
from prfl.evaluation import policy_eval, tables
from prfl.evaluation.media import browser_mp4, grid
from prfl.evaluation.report import write_samples_page
from prfl.factory.backbone import build_backbone, policy_adapter_name
from prfl.factory.data import encode_prompts
from prfl.factory.evaluation import build_judge
from prfl.factory.policy import load_checkpoint_policy, load_policy, moment_of, scale_adapter, weights_hash
from prfl.factory.prompts import load_prompts
from prfl.runs.outcomes import outcome_of
from prfl.runs.steer import steer_in_run
from prfl.training.distributed import make_accelerator
from prfl.training.run_folder import RunFolder
from prfl.utils import processes
from prfl.utils.console import console, progress
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write
from prfl.utils.lock import folder_lock


@dataclass(frozen=True)
class Drawn:
    """What is drawn: see ``sample``."""

    prompts: Sequence[str]
    base: bool
    checkpoint: str | None
    lora_scale: float


def sample(
    config: Config,
    *,
    compare_base: bool = False,
    prompts: Sequence[str] = (),
    base: bool = False,
    checkpoint: str | None = None,
    lora_scale: float = 1.0,
) -> None:
    """Draw videos: a steered one of each prompt where the config has ``steering``, else its plain samples.

    prompts: none are the validation prompts, or the training prompts where there are none.  base: the untrained model.
    checkpoint: of the run, in place of its result.  lora_scale: factor of what the policy's adapter changes.
    Writes a folder below the run's samples: mp4 files and index.html with everything.  Several processes share the
    prompts out.
    """
    if config.trains_reward and not config.steering:
        fix = (
            "give the config of a policy, or --best-of 8; --per-prompt 4 draws the base's videos, for people to compare"
        )
        raise PrflError("this config trains a reward, which draws no videos", where="objective.name", fix=fix)
    if (compare_base or base) and not config.trains_reward and not policy_adapter_name(config):
        option = "--compare-base" if compare_base else "--base"
        fix = f"leave {option} out; sample the base's own config for its videos"
        raise PrflError("all weights were trained in place: there is no base left", where="backbone.train", fix=fix)
    if compare_base and (config.steering or base):
        what = "it is for plain samples of a policy" if config.steering else "the base is drawn already"
        raise PrflError(what, where="--compare-base", fix="leave it out")
    with processes.peer_errors():
        make_accelerator(RunFolder(config.run), config.backbone.device, [], config.training.timeout)
        with folder_lock(config.run):
            sample_in_run(config, compare_base, Drawn(prompts, base, checkpoint, lora_scale))


def sample_in_run(config: Config, compare_base: bool, drawn: Drawn) -> None:
    if not processes.is_main():
        console.quiet = True
    model = build_backbone(config)
    base = drawn.base or config.trains_reward
    weights = "base" if base else load_drawn(config, model, drawn)
    splits = load_prompts(config.data)
    listed = {str(prompt): prompt for split in splits.values() for prompt in split}  # with their first frames
    of_round = (splits.get("validation") or splits["train"])[: config.evaluation.prompts_per_round]
    prompts = [listed.get(prompt, prompt) for prompt in drawn.prompts] or of_round
    check_asks(prompts, model.facts.takes, "--prompt")
    encode_prompts(config, model, prompts, progress("encoding the prompts"))
    if not set(prompts) <= set(listed.values()):
        evaluation = config.evaluation.model_copy(update={"judge": None})  # it knows the world's prompts only
        config = config.model_copy(update={"evaluation": evaluation})
    if config.steering:
        adapter = None if base else policy_adapter_name(config)
        steer_in_run(config, model, prompts, adapter, weights, build_judge(config.evaluation))
        return
    draw_plainly(
        config, model, prompts, ["base"] if base else ["base", "policy"] if compare_base else ["policy"], drawn
    )


def load_drawn(config: Config, model: Backbone, drawn: Drawn) -> str:
    """Put the policy's weights into the model; returns what tells them from others."""
    if drawn.checkpoint is None:
        load_policy(config, model)
        weights = weights_hash(config)
    else:
        weights = load_checkpoint_policy(config, model, drawn.checkpoint)
    if drawn.lora_scale != 1:
        scale_adapter(config, model, drawn.lora_scale)
        weights += f" x {drawn.lora_scale:g}"
    return weights


def draw_plainly(
    config: Config, model: Backbone, prompts: list[str], names: list[Literal["base", "policy"]], drawn: Drawn
) -> None:
    per_prompt = config.evaluation.samples_per_prompt
    outcomes = []
    for name in names:
        bar = progress(f"sampling: {name}")
        outcomes.append(
            outcome_of(config, model, {}, prompts, per_prompt, name, keep_videos=len(prompts), progress=bar)
        )

    # The videos, all of them in one grid, and a page.
    if not processes.is_main():
        return
    folder = config.run / "samples" / "sampled"
    made_by = moment_of(config) if "policy" in names and drawn.checkpoint is None else None
    path = policy_eval.write_results(folder, outcomes, config.data.fps, made_by)
    groups = list(zip(*(outcome.pixels for outcome in outcomes), strict=True))
    with atomic_write(path.with_name("grid.mp4")) as temporary:
        temporary.write_bytes(browser_mp4(grid(groups), config.data.fps))
    console.print(tables.policy_table(outcomes))
    page = write_samples_page(path, f"Samples of {config.run.resolve().name}")
    console.say(f"open in a browser: {page}")
