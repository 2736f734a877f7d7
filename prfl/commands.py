"""What the commands do: a stage of training from its config to its report, the cache, evaluation, samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from prfl import build, processes
from prfl.backbone import WanBackbone
from prfl.backbone.adapters import reach
from prfl.config import dump_resolved, identity
from prfl.config.rules import FEWEST_PROMPTS
from prfl.config.schema import Config, PreferenceConfig, SftConfig
from prfl.console import console, disable_progress_bars, progress, warn
from prfl.data.files import replacing
from prfl.data.lock import folder_lock
from prfl.data.prompts import plain
from prfl.earlier import set_aside
from prfl.errors import GuardError, PrflError
from prfl.evaluation import hacking, policy_eval, reward_eval, tables
from prfl.evaluation.media import browser_mp4, grid
from prfl.evaluation.report import write_report, write_samples_page
from prfl.flow import chain_sigmas
from prfl.forecast import fill_card, out_of_memory
from prfl.keeping import BestRound
from prfl.objective import Objective
from prfl.reward_stage import measure_reward, say_incomparable, show_measured, train_reward, warn_of_doubts
from prfl.training import Hook, RunFolder, TrainResult, Watched, make_accelerator
from prfl.training import train as run_training
from prfl.training.checkpoint import identity_hash
from prfl.training.guards import check_differs_from_base, check_starts_as_base


def train(config: Config, *, resume: str = "auto") -> None:
    """Run one stage."""
    build.prompts(config.data.prompts)
    with processes.peers(), out_of_memory(config):
        train_stage(config, resume)


def train_stage(config: Config, resume: str) -> None:
    own, run = config.training, RunFolder(config.run, dump_resolved(config))
    accelerator = make_accelerator(run, config.backbone.device, own.trackers, own.timeout)
    with folder_lock(config.run):
        train_in(run, config, accelerator, resume)


def train_in(run: RunFolder, config: Config, accelerator: Accelerator, resume: str) -> None:
    if not processes.is_main():
        console.quiet = True
        disable_progress_bars()
    console.print(f"{config.objective.name}: {config.run}", style="bold")
    model = build.backbone(config)
    chosen = {**build.kernels(config), "attention": build.attention(config, model)}
    for choice, operations in groupby(chosen.items(), lambda item: item[1]):
        names = ", ".join(name for name, _ in operations)
        console.print(f"{names}: {choice.backend} ({choice.reason})", markup=False, soft_wrap=True)
    build.check_prompts(config, model)
    if config.backbone.adapter:
        check_starts_as_base(model, build.POLICY)
        layers, blocks = reach(model.transformer, build.POLICY)
        console.print(f"adapter on {layers} layers of {blocks} blocks", highlight=False)
    if config.backbone.checkpointing == "auto":
        console.print(f"checkpointing: {fill_card(config, model)}", markup=False, soft_wrap=True)
    path = build.fill_cache(config, model, progress("generated clips")) if build.has_clips(config) else None
    clips = build.dataset(config, model, path, "train") if path else None
    model.park_vae()
    whole = identity(config) | build.contents(config, model, clips)
    begin = partial(
        run_training,
        settings=config.training,
        run=run,
        seed=config.seed,
        accelerator=accelerator,
        resume=resume,
        identity=whole,
        former=build.former_contents(clips),
        set_aside=partial(set_aside, config),
        watched=watched(config, model),
    )
    if isinstance(config.objective, PreferenceConfig):
        assert path is not None and clips is not None
        model.drop_text_encoder()  # a policy's stage encodes its prompts first
        held = build.dataset(config, model, path, "validation")
        result = train_reward(config, model, run, begin, clips, held, identity_hash(whole))
    else:
        result = train_policy(config, model, run, begin, clips, identity_hash(whole))
    if result.stopped:
        raise KeyboardInterrupt
    show_report(run.path)


def watched(config: Config, model: WanBackbone) -> Watched:
    """What the trainer looks at beside the parameters it trains: all weights, and the policy's output by its base's."""
    parts = {"transformer": model.transformer, "vae": model.vae}
    weights = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    adapter = None if isinstance(config.objective, PreferenceConfig) else build.policy_adapter(config)
    if adapter is None:
        return Watched(weights)
    return Watched(weights, partial(check_differs_from_base, model, adapter, rate=config.training.learning_rate))


def show_report(run: Path) -> None:
    if processes.is_main():
        console.print(f"report: {write_report(run)}", markup=False)
    processes.wait()


# ------------------------------------------------------------------------------------------------- training a policy


def train_policy(
    config: Config,
    model: WanBackbone,
    run: RunFolder,
    begin: Callable[..., TrainResult],
    clips: build.Dataset | None,
    run_id: str,
) -> TrainResult:
    """SFT or a reward-gradient method; rounds on validation prompts, at the end base and policy on test prompts.

    run_id: a hash of the run's identity.
    """
    known = build.prompts(config.data.prompts)
    if config.evaluation.stop_on_hacking and len(known["validation"]) < FEWEST_PROMPTS:
        what = f"stop_on_hacking compares {FEWEST_PROMPTS} prompts or more, and there are {len(known['validation'])}"
        raise PrflError(what, where="data.prompts.validation", fix="give more, or evaluation.stop_on_hacking=false")
    build.remember(config, model, prompts_of(config), progress("encoding the prompts"))
    reward: build.Reward | None = None
    if isinstance(config.objective, SftConfig):
        assert clips is not None
        objective: Objective = build.sft(config, model, clips)
    else:
        reward = build.trained_reward(config, model)
        warn_of_doubts(reward, build.followed(config, reward), "reward.path")
        objective = build.steering(config, model, reward, clips)
    rewards = build.watched_rewards(config, model, reward)
    fallen: list[hacking.Fall] = []
    kept = BestRound(config, model, run, run_id) if config.evaluation.keep_best else None

    def watch(step: int) -> dict[str, float]:
        some = known["validation"][: config.evaluation.prompts_per_round]
        outcome = outcome_of(config, model, rewards, some, config.evaluation.samples_per_prompt, "policy")
        if processes.is_main():
            made_by = asdict(build.Moment(step, step, run_id))
            policy_eval.write_results(run.samples / f"step-{step:06d}", [outcome], config.data.fps, made_by)
            fallen[:] = hacking.falls(hacking.rounds(run.samples, step))
            for fall in fallen:
                warn(f"reward hacking? {fall}")
        fallen[:] = processes.gather(fallen)[0]
        found = policy_eval.flat(policy_eval.summarise(outcome)) | {"hacking": float(len(fallen))}
        return found | (kept.after_round(step) if kept else {})

    def save_result(step: int) -> None:
        if kept:
            kept.restore()
        if processes.is_main():
            moment = build.Moment(kept.best[0] if kept else step, step, build.run_hash(run.path, run_id))
            build.save_policy(run.path, model, config, moment)

    def stop_on_hacking(step: int) -> dict[str, float]:
        if fallen:
            better = (
                "train with a lower learning rate, objective.sft or objective.distance_weight, or a better reward; "
            )
            if kept:  # this is the end of the run, and its best round is known
                save_result(step)
                place = build.policy_place(config, run.path)
                fix = f"{place} is the policy of step {kept.best[0]}, the best round by {kept.key}; to have more, "
                fix += better + "or evaluation.stop_on_hacking=false"
            else:
                fix = f"take a checkpoint of step {fallen[0].since} or soon after; {better}or "
                fix += "evaluation.stop_on_hacking=false, with evaluation.keep_best to have the best round"
            show_report(run.path)
            what = f"reward hacking at step {step}: {'; '.join(map(str, fallen))}"
            raise GuardError(what, where=str(run.samples), fix=fix)
        return {}

    def finish(step: int) -> dict[str, float]:
        save_result(step)
        if config.evaluation.final_samples:
            compare_base(config, model, rewards, run)
        return {}

    every = config.evaluation.every
    hooks = [Hook(every, watch, at_start=True)] if every else []
    if config.evaluation.stop_on_hacking:
        hooks.append(Hook(every, stop_on_hacking))
    enough = kept.spent if kept else None
    regulariser = build.regulariser(config, model, clips)
    return begin(objective, hooks=hooks, regulariser=regulariser, enough=enough, finish=finish)


def prompts_of(config: Config) -> list[str]:
    """What a policy's training encodes beside its clips' prompts: what its chains start with, and what is watched."""
    known, own = build.prompts(config.data.prompts), config.evaluation
    watched = known.get("validation", [])[: own.prompts_per_round] if own.every else []
    compared = known.get("test", [])[: own.final_samples]
    return [*(build.met_prompts(config) if config.reward else []), *watched, *compared]


def outcome_of(
    config: Config,
    model: WanBackbone,
    rewards: Mapping[str, reward_eval.Scorer],
    some: list[str],
    per_prompt: int,
    name: Literal["base", "policy"],
    **options: Any,
) -> policy_eval.Outcome:
    outcome = policy_eval.measure(
        model,
        some,
        per_prompt,
        build.sampling(config),
        name=name,
        adapter=None if name == "base" else build.policy_adapter(config),
        judge=build.judge(config.evaluation),
        rewards=rewards,
        **options,
    )
    model.park_vae()
    return outcome


def compare_base(config: Config, model: WanBackbone, rewards: Mapping[str, reward_eval.Scorer], run: RunFolder) -> None:
    """Base and policy from the same noise on the test prompts: results.json, videos, a table.

    After full fine-tuning in place the base is gone, and the policy stands alone.
    """
    test = build.prompts(config.data.prompts)["test"][: config.evaluation.final_samples]
    per_prompt = config.evaluation.final_samples // len(test)
    names: list[Literal["base", "policy"]] = ["base", "policy"] if build.policy_adapter(config) else ["policy"]
    outcomes = [
        outcome_of(config, model, rewards, test, per_prompt, name, progress=progress(f"sampling: {name}"))
        for name in names
    ]
    if processes.is_main():
        made_by = build.moment_of(config)
        policy_eval.write_results(run.samples / "final", outcomes, config.data.fps, made_by)
    console.print(tables.policy_table(outcomes))


# ---------------------------------------------------------------------------------------------- the other commands


def cache(config: Config) -> None:
    """Encode the config's clips and prompts."""
    model = build.backbone(config)
    build.check_prompts(config, model)
    if build.has_clips(config):
        build.fill_cache(config, model, progress("generated clips"))
    if not isinstance(config.objective, PreferenceConfig):  # which reads its clips' prompts alone
        encoded = build.remember(config, model, prompts_of(config), progress("encoding the prompts"))
        console.print(f"{encoded} prompts encoded that no clip has", markup=False)


def evaluate(
    config: Config | None,
    *,
    run: Path | None = None,
    overrides: Sequence[str] = (),
    heads: Mapping[str, Path] | None = None,
    manifest: Path | None = None,
) -> None:
    """Measure trained rewards, side by side, at every noise level; or a trained policy beside its base.

    run: a finished run's folder, in place of a config; None is that of the first head.  overrides: keys of the run's
    config to change.  heads: saved rewards by name; none is the one that the config trained.
    manifest: other labelled videos, all of them held out (out of domain, say); None is the config's validation split.
    """
    if config is None:
        folder = run or next(iter(heads.values() if heads else [])).parent
        config = build.finished_run(folder, overrides)
    with folder_lock(config.run):
        evaluate_in_run(config, heads, manifest)


def evaluate_in_run(config: Config, heads: Mapping[str, Path] | None, manifest: Path | None) -> None:
    model = build.backbone(config)
    if heads is None and manifest is None and not isinstance(config.objective, PreferenceConfig):
        return evaluate_policy(config, model)
    rewards = {
        name: build.load_reward(folder, model, adapter_name=f"reward-{number}")
        for number, (name, folder) in enumerate((heads or {"head": config.run / "reward"}).items())
    }
    train = None  # its samples say how far apart two scores are still a tie
    if manifest is None or build.has_clips(config):
        path = build.fill_cache(config, model, progress("generated clips"))
        train = build.dataset(config, model, path, "train")
    if manifest is None:
        held = build.dataset(config, model, path, "validation")
    else:
        path = manifest
        build.encode(config, model, path)
        held = build.cached(config, model, path)
    if held is None:
        fix = 'add "split": "validation" to the held-out rows'
        raise PrflError("there are no held-out rows", where=str(path), fix=fix)
    if train is not None and manifest is not None:
        warn_of_trained(held, train, manifest)
    results = config.run / "reward_eval.json" if manifest is None else reward_eval.results_of(config.run, manifest)
    at = reward_eval.levels(chain_sigmas(config.rollout.steps, build.shift(config, model)).tolist())
    say_incomparable(rewards, held)
    measured = measure_reward(config, rewards, model, held, train, results, at, clips=str(path))
    show_measured(measured, results)
    show_report(config.run)


def warn_of_trained(held: build.Dataset, train: build.Dataset, manifest: Path) -> None:
    """All rows of another manifest are held out, so they say; the reward may have been trained on some."""
    videos = len(held.entries & train.entries)
    trained = {plain(prompt) for prompt in train.prompts}
    prompts = [prompt for prompt in dict.fromkeys(held.prompts) if plain(prompt) in trained]
    if videos or prompts:
        example = f", as {prompts[0][:60]!r}" if prompts else ""
        warn(f"{manifest}: {videos} videos and {len(prompts)} prompts are among those of the training{example}")


def evaluate_policy(config: Config, model: WanBackbone) -> None:
    """Base and policy on the test prompts again: samples/final and the report, as at the end of the training."""
    build.load_policy(config, model)
    if not config.evaluation.final_samples:
        fix = "say how many samples: evaluation.final_samples=64"
        raise PrflError("there are no samples to measure", where="evaluation.final_samples", fix=fix)
    build.remember(config, model, build.prompts(config.data.prompts)["test"], progress("encoding the prompts"))
    reward = None if isinstance(config.objective, SftConfig) else build.trained_reward(config, model)
    compare_base(config, model, build.watched_rewards(config, model, reward), RunFolder(config.run))
    show_report(config.run)


def sample(config: Config, *, compare_base: bool = False) -> None:
    """Videos of the trained policy on the validation prompts, or on the training prompts where there are none.

    Writes samples/sampled below the run: one mp4 a video, all of them in grid.mp4, and index.html with everything.
    """
    if isinstance(config.objective, PreferenceConfig):
        fix = "give the config of a policy; --per-prompt 4 draws the base's videos, for people to compare"
        raise PrflError("this config trains a reward, which draws no videos", where="objective.name", fix=fix)
    if compare_base and not build.policy_adapter(config):
        fix = "leave --compare-base out; sample the base's own config for its videos"
        raise PrflError("all weights were trained in place: there is no base left", where="backbone.train", fix=fix)
    with folder_lock(config.run):
        sample_in_run(config, compare_base)


def sample_in_run(config: Config, compare_base: bool) -> None:
    model = build.backbone(config)
    build.load_policy(config, model)
    known = build.prompts(config.data.prompts)
    some = (known.get("validation") or known["train"])[: config.evaluation.prompts_per_round]
    build.remember(config, model, some, progress("encoding the prompts"))
    names: list[Literal["base", "policy"]] = ["base", "policy"] if compare_base else ["policy"]
    per_prompt = config.evaluation.samples_per_prompt
    outcomes = [
        outcome_of(
            config, model, {}, some, per_prompt, name, keep_videos=len(some), progress=progress(f"sampling: {name}")
        )
        for name in names
    ]
    folder = config.run / "samples" / "sampled"
    path = policy_eval.write_results(folder, outcomes, config.data.fps, build.moment_of(config))
    groups = list(zip(*(outcome.pixels for outcome in outcomes), strict=True))
    with replacing(path.with_name("grid.mp4")) as temporary:
        temporary.write_bytes(browser_mp4(grid(groups), config.data.fps))
    console.print(tables.policy_table(outcomes))
    page = write_samples_page(path, f"Samples of {config.run.resolve().name}")
    console.print(f"open in a browser: {page}", markup=False, soft_wrap=True)
