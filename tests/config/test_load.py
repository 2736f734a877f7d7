"""Loading a config: what is accepted, and that every mistake is named with its yaml path and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from prfl.config import config_hash, dump_resolved, identity, json_schema, load_config
from prfl.config.sections.data import LENGTHS
from prfl.config.sections.reward_gradient import PrflConfig, VaderConfig
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize

Write = Callable[..., Path]


def test_numbers_and_defaults(write: Write) -> None:
    config = load_config(write())
    assert config.training.learning_rate == 1e-5
    assert config.training.batch == 2 and config.training.accumulation == 1
    assert isinstance(config.objective, PrflConfig) and config.objective.handoff == "next"
    assert config.run == Path("runs/x")


def test_the_file_of_a_misspelt_key_is_named(write: Write) -> None:
    path = write()
    path.write_text(path.read_text().replace("{steps: 10}", "{steps: 10, stepz: 3}"))
    with pytest.raises(PrflError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: rollout.stepz: unknown key. Did you mean 'steps'?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # keys
        ("rollout.stepz=3", "rollout.stepz: unknown key. Did you mean 'steps'?"),
        ("training.step_weight=unit", "training.step_weight: unknown key. Did you mean 'rollout.step_weight'?"),
        ("objective.last_steps=1", "objective.last_steps: unknown key; it belongs to name: vader or alignprop"),
        ("objective.beta=1", "objective.beta: unknown key; it belongs to name: dense_process"),
        ("objective.sft.evry=2", "objective.sft.evry: unknown key. Did you mean 'every'?"),
        ("data.generator.wrnog=0.1", "data.generator.wrnog: unknown key. Did you mean 'wrong'?"),
        ("backbone.adapter.dora=true", "backbone.adapter.dora: unknown key; the keys here are rank, alpha"),
        ("reward.scores=[{name: hps}]", "reward.scores: unknown key; each reward is a key here, and what each of its"),
        ("qqq=1", "qqq: unknown key; the keys here are version, run, seed"),
        # choices
        ("objective.name=prlf", "objective.name: 'prlf' is none of sft, preference, prfl, vader, "),
        ("objective.name=prlf", "dense_process. Did you mean 'prfl'?"),
        ("objective={sft: {}}", "objective.name: missing"),
        ("reward.space=latents", "reward.space: 'latents' is none of latent, pixel. Did you mean 'latent'?"),
        ("backbone.dtype=float3", "Did you mean 'float32'?"),
        ("version=2", "version: should be 1, got 2"),
        # types
        ("training.steps=ten", 'training.steps: should be a valid integer, got "ten"'),
        ("training.steps='10'", 'training.steps: should be a valid integer, got "10"'),
        ("training.steps=true", "training.steps: should be a valid integer, got true"),
        ("training.steps=1.5", "training.steps: should be a valid integer, got 1.5"),
        ("data.skip_unreadable=1", "data.skip_unreadable: should be a valid boolean, got 1"),
        ("run=7", "run: should be a valid string, got 7"),
        ("training.betas=[0.9]", "training.betas[1]: missing"),
        ("reward.weights={motion: much}", 'reward.weights.motion: should be a valid number, got "much"'),
        ("backbone.adapter.targets=[to_q, 3]", "backbone.adapter.targets[1]: should be a valid string, got 3"),
        ("training=[]", "training: "),
        ("training.batch=" + "x" * 500, "x..."),
        # ranges
        ("training.steps=0", "training.steps: should be greater than or equal to 1, got 0"),
        ("training.learning_rate=.nan", "training.learning_rate: should be a finite number"),
        ("training.learning_rate=.inf", "training.learning_rate: should be a finite number"),
        ("training.ema_decay=1.0", "training.ema_decay: should be less than 1, got 1.0"),
        ("reward.weights={}", "reward.weights: "),
        # the override itself
        ("training.steps", "training.steps: not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("training..steps=3", "not of the form key=value"),
        ("run.name=3", "'run' has no keys below it"),
        ("run=[1", "run:1: expected ',' or ']'"),
    ],
)
def test_mistakes_on_the_command_line(write: Write, override: str, message: str) -> None:
    with pytest.raises(PrflError) as caught:
        load_config(write(), [override])
    assert str(caught.value).startswith("command line: ") and message in str(caught.value)


VADER = "objective={name: vader, sft: {}}"
DENSE = "objective={name: dense_process"
CACHE = "rollout.cheaper.cache=0.1"
REUSE = "rollout.gradients_per_rollout=2"
LINEAR = "reward.shape=linear"
AESTHETIC = "reward={space: pixel, aesthetic: {mlp: a.pth}}"
PUBLIC = "reward={space: pixel, shape: linear,"
FOLDER = ("data.generator=null", "data.folder=a")
RULES = [
    (["training.batch=3", "training.accumulation=2"], "training.accumulation: 2 does not divide"),
    (["rollout.guidance.scale=3"], "rollout.guidance: gradient: none goes with scale: 1"),
    (["rollout.guidance.gradient=both"], "rollout.guidance: gradient: none goes with scale: 1"),
    (["rollout.guidance.first_frame=2"], "rollout.guidance.first_frame: at scale 1 there is no guidance"),
    (["evaluation.guidance_first_frame=2"], "evaluation.guidance_first_frame: at scale 1 there is no guidance"),
    (
        ["evaluation.guidance_scale={high: 4, low: 3}", "evaluation.guidance_first_frame=1"],
        "evaluation.guidance_first_frame: guidance goes from frame to frame, or has a scale of each expert",
    ),
    (["objective.steps_range=[0.5, 0.5]"], "objective.steps_range: needs 0 <= low < high <= 1"),
    (["data.manifest=a.jsonl"], "data.generator: data.manifest is given too"),
    (["objective.sft=null"], "data: clips are given that nobody reads"),
    (["data.generator=null"], "data.manifest: the objective trains on clips"),
    (["data.folder=a", "data.generator=null", "data.held_out=1"], "data.held_out: should be less than 1"),
    (["data.root=a"], "data.root: a config without data.manifest does not read it"),
    (["data.held_out=0.2"], "data.held_out: a config without data.folder does not read it"),
    (["data.prompts={}"], "data.prompts.train: missing; give a file of prompts"),
    (["data.buckets=[{frames: 9, height: 32, width: 32}]"], "data.buckets: the generator shapes_mixture makes"),
    ([*FOLDER, "data.buckets=[{frames: 18, height: 32, width: 32}]"], "data.buckets[0]: it is larger than data.frames"),
    ([*FOLDER, "data.buckets=[{frames: 17, height: 32, width: 32}]"], "data.buckets[0]: this size is named twice"),
    ([*FOLDER, "data.frames=33", "data.buckets=[4s-8fps, 4s-8fps]"], "data.buckets[0]: this size is named twice"),
    ([*FOLDER, "data.buckets=[4s-8fps]"], "data.buckets[0]: it is larger than data.frames"),
    ([*FOLDER, "data.buckets=[4s-8fp]"], "data.buckets[0]: should be one of 2s-16fps"),
    (
        [*FOLDER, "objective={name: instructvideo}", "data.buckets=[{frames: 9, height: 32, width: 32}]"],
        "starts chains",
    ),
    (["evaluation.every=5"], "data.prompts.validation: evaluation.every needs"),
    (["evaluation.final_samples=5"], "data.prompts.test: evaluation.final_samples needs"),
    (["backbone.adapter=null"], "backbone.adapter: missing; train: lora needs it"),
    (["backbone.train=full"], "backbone.adapter: train: full does not read it"),
    (["reward=null"], "reward: objective prfl follows a trained reward"),
    (["reward.head={dimensions: [a], blocks: [0]}"], "reward: objective prfl follows a trained reward"),
    (["reward.space=pixel"], "objective.handoff: a pixel reward cannot score a noisy latent"),
    (["objective={name: vader, last_steps: 11, sft: {}}"], "objective.last_steps: the chain has only 10 steps"),
    (["objective={name: vader, frames: 2, sft: {}}"], "objective.frames: a latent reward scores all frames"),
    (["objective={name: prfl, frames: one, sft: {}}"], "objective.frames: a latent reward scores all frames"),
    (["objective={name: drtune, trained_steps: 11, sft: {}}"], "objective.trained_steps: the chain has only 10 steps"),
    (["objective={name: alignprop, last_steps: [3, 2], sft: {}}"], "objective.last_steps: needs low <= high <= 10"),
    (["objective={name: alignprop, last_steps: [1, 11], sft: {}}"], "objective.last_steps: needs low <= high <= 10"),
    (["objective={name: alignprop, last_steps: [0, 2], sft: {}}"], "objective.last_steps[0]: should be greater"),
    (["objective={name: leapalign, sft: {}}", "rollout.steps=1"], "rollout.steps: objective leapalign needs a chain"),
    (["objective={name: draft_lv, sft: {}}", "rollout.steps=1"], "rollout.steps: objective draft_lv needs a chain"),
    (["objective={name: refl, steps_range: [0.9, 0.8], sft: {}}"], "objective.steps_range: needs 0 <= low < high <= 1"),
    ([f"{DENSE}, rewards: 11, sft: {{}}}}"], "objective.rewards: steps_range has only 10 of the chain's 10 steps"),
    ([f"{DENSE}, steps_range: [0.8, 1.0], sft: {{}}}}"], "objective.rewards: steps_range has only 2 of the chain's"),
    ([f"{DENSE}, steps_range: [0.8, 0.8], sft: {{}}}}"], "objective.steps_range: needs 0 <= low < high <= 1"),
    ([f"{DENSE}, credit: step, beta: 1.0, sft: {{}}}}"], "objective.beta: credit: step does not read it"),
    ([f"{DENSE}, sft: {{}}}}", "reward.space=pixel"], "objective.handoff: a pixel reward cannot score a noisy latent"),
    (["objective={name: prfl, from_data: 0.5}", "data.generator=null"], "data.manifest: the objective trains on clips"),
    (["objective.from_data=0.5", "rollout.solver=unipc"], "rollout.solver: objective.from_data starts inside"),
    (["objective.from_data=0.5", "objective.steps_range=[0.0, 0.1]"], "objective.from_data: steps_range has no step"),
    (
        [f"{DENSE}, rewards: 10, from_data: 0.5}}"],
        "objective.rewards: steps_range has only 9 of the chain's 10 steps b",
    ),
    ([f"{DENSE}, from_data: 1.5}}"], "objective.from_data: should be less than or equal to 1"),
    (["objective={name: instructvideo}", "data.generator=null"], "data.manifest: the objective trains on clips"),
    (["objective={name: instructvideo}", "rollout.solver=unipc"], "rollout.solver: objective instructvideo starts"),
    (["objective={name: instructvideo, last_steps: 7}"], "objective.last_steps: objective.start leaves only 6 of"),
    (["objective={name: instructvideo, temporal_decay: 1.0}"], "objective.temporal_decay: a latent reward does not"),
    (
        ["objective={name: instructvideo, temporal_decay: 1.0}", "reward.space=pixel", "reward.aggregate=logsigmoid"],
        "objective.temporal_decay: a weighted logit is no logit",
    ),
    (
        [VADER, AESTHETIC, "reward.shape=linear", "reward.balance=gradient_norm"],
        "reward.balance: one reward, with noth",
    ),
    (
        [VADER, AESTHETIC, "reward.shape=linear", "reward.balance=gradient_norm", "reward.latent=x"],
        "reward.balance: lengths of gradients are compared at the pixels",
    ),
    (
        [
            "objective={name: vader, sft: {}, frames: one}",
            "reward={space: pixel, shape: linear, videoalign: {model: x}}",
        ],
        "objective.frames: reward.videoalign reads whole videos; set it to all",
    ),
    ([VADER, AESTHETIC, "reward.target=10.0", "reward.path=x"], "reward.path: reward.aesthetic does not read it"),
    (
        [VADER, AESTHETIC, "reward.target=10.0", "reward.aggregate=logsigmoid"],
        "reward.aggregate: the score of reward.aesthetic is no logit",
    ),
    ([VADER, AESTHETIC], "reward.target: nearly every picture scores above it"),
    ([VADER, "reward={space: pixel, hps: {weights: a.pt}}"], "reward.target: that is for a trained reward's scores"),
    ([VADER, f"{PUBLIC} object: {{}}}}"], "reward.object.present: name an object that is to be seen"),
    ([VADER, f"{PUBLIC} callable: {{function: sharp}}}}"], "reward.callable.function: no installed package offers"),
    ([VADER, f"{PUBLIC} callable: {{function: 'a:'}}}}"], "reward.callable.function: give module:function"),
    (
        [VADER, AESTHETIC, "reward.target=10.0", "reward.aesthetic.clip=.", "reward.aesthetic.revision=v1"],
        "reward.aesthetic.revision: a model in a folder does not read it",
    ),
    (["reward.shape=linear", "reward.target=10.0"], "reward.target: shape linear does not read it"),
    (["backbone.revision=v1", "backbone.model=somewhere"], "backbone.revision: a model in a folder does not read it"),
    (["objective.sft=null", "data.generator=null", "data.encode_batch=1"], "data.encode_batch: a config without clips"),
    (["objective={name: sft}"], "reward: objective sft does not read it"),
    (["objective={name: sft}", "reward=null", "rollout.step_weight=unit"], "rollout.step_weight: objective sft"),
    (["objective={name: sft}", "reward=null", "rollout.solver=flow_sde"], "rollout.solver: objective sft"),
    (["rollout.stride=2", "rollout.solver=unipc"], "rollout.stride: unipc takes no leaps"),
    (["rollout.stride=2", "rollout.solver=flow_sde"], "rollout.stride: flow_sde takes no leaps"),
    (
        ["rollout.stride=2", "objective={name: full_chain, sft: {}}"],
        "rollout.stride: objective full_chain trains every",
    ),
    (
        ["rollout.stride=2", "objective={name: vader, last_steps: 10, sft: {}}"],
        "rollout.stride: objective vader trains",
    ),
    (
        ["rollout.stride=2", "objective={name: leapalign, sft: {}}"],
        "rollout.stride: a leap that the rollout itself takes misses its end by nothing",
    ),
    (["rollout.stride=2", "objective.from_data=1"], "rollout.stride: objective.from_data: 1 needs no rollout"),
    (["rollout.stride=2", "objective={name: sft}", "reward=null"], "rollout.stride: objective sft does not read it"),
    ([CACHE, "objective={name: full_chain, sft: {}}"], "rollout.cheaper: objective full_chain trains every step"),
    ([CACHE, "objective={name: vader, last_steps: 10, sft: {}}"], "rollout.cheaper: objective vader trains"),
    ([CACHE, "objective={name: instructvideo, last_steps: 6}"], "rollout.cheaper: objective instructvideo trains"),
    ([CACHE, "rollout.steps=1"], "rollout.cheaper: objective prfl trains every step"),
    ([CACHE, "objective.from_data=1"], "rollout.cheaper: objective.from_data: 1 needs no rollout"),
    ([CACHE, "objective={name: sft}", "reward=null"], "rollout.cheaper: objective sft does not read it"),
    (["rollout.cheaper.cache=1"], "rollout.cheaper.cache: should be less than 1"),
    (["rollout.cheaper.products=int8"], "rollout.cheaper.products: should be exact or float8"),
    (["rollout.stride=0"], "rollout.stride: should be greater than or equal to 1"),
    (["rollout.drift_limit=0.5"], "rollout.drift_limit: gradients_per_rollout: 1 does not read it"),
    ([REUSE, "objective={name: vader, sft: {}}"], f"{REUSE[:-2]}: objective vader needs its own rollout each time"),
    ([REUSE, "objective.from_data=0.5"], f"{REUSE[:-2]}: objective.from_data: chains from clips need no rollout"),
    ([REUSE, f"{DENSE}, beta: 0.5, sft: {{}}}}"], f"{REUSE[:-2]}: objective.beta: a gradient along the chain"),
    ([REUSE, "rollout.solver=unipc"], f"{REUSE[:-2]}: unipc's steps contain outputs"),
    ([REUSE, "backbone.adapter.dropout=0.1"], f"{REUSE[:-2]}: backbone.adapter.dropout would pass for drift"),
    ([REUSE, "objective={name: sft}", "reward=null"], f"{REUSE[:-2]}: objective sft does not read it"),
    (["rollout.eta=0.5"], "rollout.eta: solver euler does not read it"),
    (["rollout.solver=unipc", "rollout.eta=0.5"], "rollout.eta: solver unipc does not read it"),
    (["rollout.solver=flow_sde", "rollout.eta=0"], "rollout.eta: should be greater than 0"),
]
HEAD = ["backbone.adapter=null", "reward={space: latent, head: {dimensions: [a], blocks: [0]}}"]
PIXEL_HEAD = ["backbone.adapter=null", "reward={space: pixel, head: {dimensions: [a]}}"]
CLIPS = "data.generator={name: video_clips, videos: somewhere}"
PREFERENCE = "objective={name: preference, loss: bce}"
HEAD_RULES = [
    ([PREFERENCE], "reward: objective preference trains a new reward"),
    ([PREFERENCE, *HEAD, "backbone.adapter={rank: 1, alpha: 1}"], "backbone.adapter: objective preference trains the"),
    ([PREFERENCE, *HEAD, "backbone.train=full"], "backbone.train: objective preference"),
    ([PREFERENCE, *HEAD, "reward.target=3.0"], "reward.target: objective preference does not read it"),
    ([PREFERENCE, *HEAD, "reward.head.heads=3"], "reward.head.heads: 3 does not divide inner 128"),
    ([PREFERENCE, *HEAD, "reward.head.pooling=mean", "reward.head.queries=2"], "reward.head.queries: pooling mean"),
    ([PREFERENCE, *HEAD, CLIPS], "objective.loss: the generator video_clips makes pairs, and bce needs labels"),
    ([PREFERENCE, *HEAD, "objective.eta=3.0"], "objective.eta: loss bce does not read it"),
    ([PREFERENCE, *HEAD, "objective.keep_decoded=true"], "objective.keep_decoded: a latent reward does not read it"),
    ([PREFERENCE, *PIXEL_HEAD, "objective.sigma_sampling=shifted"], "objective.sigma_sampling: a pixel reward"),
    ([PREFERENCE, *PIXEL_HEAD, "reward.aesthetic={mlp: a.pth}"], "reward.aesthetic: objective preference does not"),
]


def test_a_length_by_name_is_its_numbers(write: Write) -> None:
    """Of the first height and width; the resolved config has the numbers, and reads back as it is."""
    given = [*FOLDER, "data.frames=81", "data.fps=16", "data.buckets=[4s-8fps, {frames: 5, height: 16}]"]
    config = load_config(write(), given)
    assert config.data.sizes == (VideoSize(81, 32, 32, 16), VideoSize(33, 32, 32, 8), VideoSize(5, 16, 32, 16))
    assert load_config(write(dump_resolved(config), "resolved.yaml")) == config
    for name, length in LENGTHS.items():
        assert str(round((length["frames"] - 1) / length["fps"])) + f"s-{length['fps']}fps" == name
    items = json_schema()["$defs"]["DataConfig"]["properties"]["buckets"]["items"]["anyOf"]
    assert items == [{"$ref": "#/$defs/BucketConfig"}, {"enum": list(LENGTHS)}]


@pytest.mark.parametrize(("overrides", "message"), RULES + HEAD_RULES)
def test_keys_that_do_not_go_together(write: Write, overrides: list[str], message: str) -> None:
    with pytest.raises(PrflError) as caught:
        load_config(write(), overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [PREFERENCE, *HEAD],
        [PREFERENCE, *PIXEL_HEAD, "objective.keep_decoded=true", "objective.frames=4"],
        ["objective={name: preference, loss: rao_kupper, eta: 3.0}", *HEAD],
        ["objective={name: sft}", "reward=null"],
        ["objective.sft=null", "data.generator=null"],
        ["objective={name: vader, frames: 3, sft: {}}", "reward.space=pixel"],
        [VADER, AESTHETIC, "reward.target=10.0"],
        ["objective={name: full_chain, sft: {}}"],
        ["objective={name: alignprop, last_steps: [2, 10], sft: {}}"],
        ["objective={name: draft_lv, copies: 4, sft: {}}"],
        ["objective={name: refl, frames: one, sft: {}}", "reward.space=pixel"],
        ["objective={name: drtune, trained_steps: 10, spacing: random, early_stop: 0.4, sft: {}}"],
        ["objective={name: leapalign, alpha: 0.0, similarity_floor: null, sft: {}}", "rollout.stride=2"],
        ["objective={name: instructvideo, frames: 4, temporal_decay: 1.0, last_steps: 6}", "reward.space=pixel"],
        ["objective={name: prfl, from_data: 0.5}"],
        [f"{DENSE}, rewards: 9, from_data: 1.0}}"],
        [f"{DENSE}, rewards: 10, beta: 1.0, sft: {{}}}}"],
        [f"{DENSE}, handoff: clean, credit: step, sft: {{}}}}", "reward.space=pixel"],
        [VADER, AESTHETIC, "reward.shape=linear"],
        ["objective={name: preference, loss: thurstone}", *HEAD, CLIPS, "data.generator.formats=[gif]"],
        [CLIPS],
        ["rollout.guidance={scale: 3, gradient: cond}"],
        ["rollout.solver=unipc"],
        [REUSE, "rollout.drift_limit=null", "rollout.stride=2", "objective={name: refl, sft: {}}"],
        [REUSE, f"{DENSE}, sft: {{}}}}", "rollout.solver=flow_sde"],
        ["rollout.stride=4", "objective.from_data=0.5"],
        ["rollout.solver=flow_sde", "rollout.eta=0.3"],
        [REUSE, "rollout.stride=2", "rollout.cheaper={products: float8, attention: int8, cache: 0.1}"],
        ["rollout.solver=unipc", CACHE, "objective={name: vader, last_steps: 9, sft: {}}"],
        ["objective={name: sft}", "reward=null", "rollout.solver=unipc"],
        ["backbone={model: shapes, train: full}"],
        ["data.generator={name: shapes_curated, count: 3}"],
        ["data.generator=null", "data.manifest=a.jsonl"],
    ],
)
def test_what_is_right_loads_and_survives_a_round_trip(write: Write, overrides: list[str]) -> None:
    config = load_config(write(), overrides)
    assert load_config(write(dump_resolved(config), "resolved.yaml")) == config


def test_a_missing_key_says_what_it_is(write: Write) -> None:
    path = write()
    path.write_text(path.read_text().replace("rollout: {steps: 10}", "rollout: {}"))
    with pytest.raises(PrflError, match=r"x.yaml: rollout.steps: missing \(Steps of the chain from"):
        load_config(path)


def test_every_fault_is_listed_with_its_own_place(write: Write) -> None:
    path = write()
    path.write_text(path.read_text().replace("fps: 8", "fps: fast"))
    with pytest.raises(PrflError) as caught:
        load_config(path, ["rollout.stepz=3", "training.batch=none"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{path}: data.fps: ")
    assert lines[1].startswith("command line: rollout.stepz: ")
    assert lines[2].startswith("command line: training.batch: ")


def test_overrides_make_missing_sections_and_take_precedence(write: Write) -> None:
    config = load_config(write(), ["rollout.guidance.scale=2", "rollout.guidance.gradient=both", "run=a", "run=b"])
    assert config.rollout.guidance.scale == 2 and config.run == Path("b")
    assert isinstance(load_config(write(), ["objective={name: vader, sft: {}}"]).objective, VaderConfig)


def test_a_home_folder_is_found(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_config(write(), ["run=~/runs/x"]).run == Path("/home/someone/runs/x")


def test_a_config_cannot_be_changed(write: Write) -> None:
    config = load_config(write())
    with pytest.raises(ValidationError, match="frozen"):
        config.training.steps = 3  # type: ignore[misc]


def test_hash_ignores_what_may_change_on_resume_and_nothing_else(write: Write) -> None:
    config = load_config(write())
    for override in (
        "training.steps=9",
        "run=elsewhere",
        "evaluation.batch=3",
        "training.log_every=7",
        "training.keep=5",
    ):
        assert config_hash(load_config(write(), [override])) == config_hash(config)
    for override in ("seed=1", "training.batch=4", "rollout.steps=11", "objective.sft.weight=2.0", "data.fps=9"):
        changed = load_config(write(), [override])
        key = override.partition("=")[0]
        assert config_hash(changed) != config_hash(config)
        assert {k for k, v in identity(changed).items() if identity(config)[k] != v} == {key}
