"""Counted evaluations against those that the objectives really make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prfl.backbone import Backbone
from prfl.backbone.eight_bits import Float8Linear
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.estimate import nfe as names
from prfl.estimate.nfe import count_nfe
from prfl.factory.evaluation import sampling_settings
from prfl.factory.objective import build_method, build_rollouts
from prfl.factory.rollout import build_cheaper, build_scale
from prfl.objective.loss import RewardLoss
from prfl.objective.reward_gradient import RewardGradient
from prfl.rollout.guidance import Guidance
from prfl.rollout.sampling import sample
from tests.models import copied_architecture, copied_backbone
from tests.objective.parts import PROMPTS, SHAPE, clips, latent_reward
from tests.slow import slow_unless
from tests.wan_experts import save_tiny_experts

STEPS, BATCH = 4, 2
CHEAPER = "rollout.cheaper.products=float8"


@pytest.fixture
def make(tmp_path: Path, tiny_pipeline_folder: Path) -> Callable[..., Config]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "more.txt").write_text("a red triangle\na green square\n")
    path = tmp_path / "x.yaml"
    path.write_text(f"""\
version: 1
run: runs/x
seed: 0
backbone: {{model: {tiny_pipeline_folder}, device: cpu, adapter: {{rank: 2, alpha: 2}}}}
data:
  prompts: {{train: {tmp_path}/prompts.txt}}
  cache: cache
  frames: 9
  height: 16
  width: 16
  fps: 8
reward: {{space: latent, path: absent, shape: linear, weights: {{motion: 1.0}}}}
rollout: {{steps: 5}}
objective: {{name: prfl}}
training: {{steps: {STEPS}, batch: {BATCH}, learning_rate: 1e-4}}
evaluation: {{every: 0}}
""")
    return lambda *overrides: load_config(path, overrides)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_experts(tmp_path_factory.mktemp("experts") / "tiny-a14b")


def counted(config: Config, model: Backbone) -> dict[str, int]:
    return {work.name: work.total for work in count_nfe(config, model)}


METHODS = [
    [],
    ["backbone.checkpointing=full"],
    ["backbone.checkpointing=attention", "backbone.offload=true"],
    ["objective.handoff=clean"],
    ["objective.handoff=clean", "backbone.checkpointing=full"],
    ["objective.distance_weight=0.5"],
    ["rollout.guidance={scale: 2.0, gradient: cond}"],
    ["rollout.guidance={scale: 2.0, gradient: both}"],
    ["objective={name: vader, last_steps: 2}"],
    ["rollout.solver=unipc"],
    ["rollout.solver=unipc", "backbone.checkpointing=full"],
    ["rollout.solver=unipc", "objective={name: vader, last_steps: 2}"],
    ["rollout.solver=flow_sde", "backbone.checkpointing=full"],
    ["objective={name: vader, last_steps: 1}", "backbone.checkpointing=full"],
    ["objective={name: full_chain}"],
    ["objective={name: alignprop}", "backbone.checkpointing=full"],
    ["objective={name: refl}", "rollout.guidance={scale: 2.0, gradient: cond}"],
    ["objective={name: draft_lv}"],
    ["objective={name: drtune}", "rollout.guidance={scale: 2.0, gradient: both}"],
    ["objective={name: drtune, early_stop: 0.5}"],
    ["objective={name: leapalign}", "rollout.guidance={scale: 2.0, gradient: cond}"],
    ["objective={name: leapalign, similarity_floor: null}", "objective.distance_weight=0.5"],
    ["objective={name: instructvideo, last_steps: 2}", "data.manifest=absent.jsonl"],
    ["objective={name: prfl, from_data: 0.5}", "data.manifest=absent.jsonl"],
    ["rollout.stride=2"],
    ["rollout.gradients_per_rollout=4"],
    ["rollout.gradients_per_rollout=3", "backbone.checkpointing=full"],
    ["rollout.gradients_per_rollout=3", "objective.handoff=clean", "rollout.stride=2"],
    ["rollout.gradients_per_rollout=2", "objective={name: refl}", "backbone.checkpointing=full"],
    ["rollout.gradients_per_rollout=3", "objective={name: dense_process, rewards: 3}", "objective.distance_weight=0.5"],
    [
        "rollout.gradients_per_rollout=3",
        "objective={name: dense_process, rewards: 2, handoff: clean}",
        "rollout.guidance={scale: 2.0, gradient: cond}",
    ],
    ["rollout.stride=3", "backbone.checkpointing=full", "objective.handoff=clean"],
    [
        "rollout.stride=2",
        "objective={name: leapalign, similarity_floor: null}",
        "rollout.guidance={scale: 2.0, gradient: cond}",
    ],
    ["rollout.stride=2", "objective={name: drtune, trained_steps: 1}"],
    ["objective={name: prfl, from_data: 1.0}", "data.manifest=absent.jsonl", "backbone.checkpointing=full"],
    ["objective={name: dense_process, rewards: 3, from_data: 0.5}", "data.manifest=absent.jsonl"],
    ["objective={name: dense_process, rewards: 3}", "objective.distance_weight=0.5"],
    ["objective={name: dense_process, rewards: 1, credit: step}", "backbone.checkpointing=full"],
    ["objective={name: dense_process, rewards: 2, beta: 1.0}"],
    ["objective={name: dense_process, rewards: 2, handoff: clean}", "backbone.checkpointing=full"],
    [CHEAPER],
    [CHEAPER, "rollout.guidance={scale: 2.0, gradient: cond}", "backbone.checkpointing=full"],
    [CHEAPER, "objective.handoff=clean", "rollout.stride=2"],
    [CHEAPER, "rollout.gradients_per_rollout=2", "rollout.stride=2"],
    [CHEAPER, "objective={name: drtune, trained_steps: 1}", "rollout.stride=2"],
]


def usual(overrides: list[str]) -> bool:
    """Each thing by itself, and each objective once; with checkpointing and in other company: slow."""
    chosen = overrides and overrides[0].startswith("objective={") and "checkpointing" not in overrides[1:2]
    return len(overrides) <= 1 or bool(chosen)


@pytest.mark.parametrize("overrides", slow_unless(usual, METHODS), ids=" ".join)
def test_the_objective_makes_the_calls_that_were_counted(make: Callable[..., Config], overrides: list[str]) -> None:
    # A rollout serves up to four steps, and which of its calls are cheap depends on the nodes that steps draw.
    steps = STEPS if CHEAPER in overrides or "gradients_per_rollout" in " ".join(overrides) else 2
    config = make(*overrides, f"training.steps={steps}")
    model = copied_backbone(config)
    made, counts = calls_made(config, model), counted(config, model)
    check_counts(made, counts)
    assert (made["rough"] > 0) == (CHEAPER in overrides)
    assert counts.get(names.RECOMPUTED, 0) == (counts[names.GRADIENT] if model.running.checkpointing != "none" else 0)


def check_counts(made: Counter[str], counts: dict[str, int]) -> None:
    assert made["with gradient"] == counts[names.GRADIENT]
    assert made["rough"] == counts.get(names.CHEAPER, 0)
    assert made["without"] == sum(counts.get(name, 0) for name in (names.ROLLOUT, names.UNGUIDED, names.DISTANCE))
    assert made["reward"] == counts[names.REWARD]


def calls_made(config: Config, model: Backbone) -> Counter[str]:
    """The evaluations of one sample that the objective makes in the steps of the run."""
    made: Counter[str] = Counter()
    velocity, features = model.velocity, model.features

    def count_velocity(latents, *rest):
        rough = type(model.transformer.blocks[0].ffn.net[2]) is Float8Linear
        made["with gradient" if torch.is_grad_enabled() else "rough" if rough else "without"] += len(latents)
        return velocity(latents, *rest)

    def count_features(latents, *rest):
        made["reward"] += len(latents)
        return features(latents, *rest)

    model.velocity, model.features = count_velocity, count_features  # type: ignore[method-assign]
    guidance = config.rollout.guidance
    from prfl.reward.scorer import LatentScorer

    objective = RewardGradient(
        model, build_method(config, model), LatentScorer(latent_reward(model, False)),
        RewardLoss({"motion": 1.0}, shape="linear"), PROMPTS, SHAPE,
        guidance=Guidance(build_scale(guidance.scale), guidance.gradient),
        distance_weight=config.objective.distance_weight,  # type: ignore[union-attr]
        stride=config.rollout.stride, rollouts=build_rollouts(config), cheaper=build_cheaper(config),
        clips=clips(SHAPE, {prompt: model.condition([prompt]) for prompt in PROMPTS}),
    )  # fmt: skip
    for step in range(config.training.steps):
        objective.accumulate(step, range(step * BATCH, (step + 1) * BATCH))
    return made


@pytest.mark.parametrize("scales", [{"high": 1.0, "low": 3.0}, {"high": 4.0, "low": 1.0}, {"high": 4.0, "low": 3.0}])
@pytest.mark.parametrize(
    "overrides",
    slow_unless(
        lambda overrides: len(overrides) == 1,
        [
            ["objective={name: full_chain}"],
            ["objective={name: prfl, handoff: clean}", "rollout.stride=2"],
            ["objective={name: prfl, handoff: clean}", "rollout.gradients_per_rollout=2"],
            ["objective={name: prfl, handoff: clean}", "backbone.checkpointing=full", CHEAPER],
        ],
    ),
)
@pytest.mark.parametrize("gradient", ["cond", "both"])
def test_an_expert_at_scale_one_is_called_once(
    make: Callable[..., Config], overrides: list[str], gradient: str, scales: dict[str, float], experts: Path
) -> None:
    high, low = scales.values()
    guidance = f"rollout.guidance={{scale: {{high: {high}, low: {low}}}, gradient: {gradient}}}"
    steps = 1 if "full_chain" in overrides[0] else STEPS  # of it each step is the same
    config = make(*overrides, guidance, f"backbone.model={experts}", f"training.steps={steps}")
    model = copied_backbone(config)
    check_counts(calls_made(config, model), counted(config, model))


def test_an_evaluation_sample_is_guided_by_each_experts_scale(
    make: Callable[..., Config], tmp_path: Path, experts: Path
) -> None:
    """At shift 3 and 5 steps two are the high-noise expert's."""
    drawn = [f"backbone.model={experts}", f"data.prompts.test={tmp_path}/more.txt", "evaluation.final_samples=2"]
    for scales, calls in (
        ("{high: 1, low: 3}", 2 + 6),
        ("{high: 4, low: 1}", 4 + 3),
        ("{high: 4, low: 3}", 10),
        (1, 5),
    ):
        config = make(*drawn, f"evaluation.guidance_scale={scales}", "objective={name: full_chain}")
        model = copied_backbone(config)
        assert counted(config, model)[names.SAMPLING] == 2 * 2 * calls  # of base and policy
        made, velocity = [], model.velocity
        model.velocity = lambda *inputs, made=made, velocity=velocity: made.append(1) or velocity(*inputs)  # type: ignore[method-assign]
        sample(model, PROMPTS[:1], [0], sampling_settings(config))
        assert len(made) == calls


def test_chains_that_start_from_data_need_no_rollout(make: Callable[..., Config]) -> None:
    data = ["objective={name: prfl, from_data: 1.0}", "data.manifest=absent.jsonl"]
    held = make(*data, "backbone.checkpointing=full")
    assert names.ROLLOUT not in counted(held, copied_architecture(held)), "the trained step is all"
    plain = make(*data)
    assert counted(plain, copied_architecture(plain))[names.ROLLOUT] == STEPS * BATCH, "its end, to be scored"


def test_evaluation_samples_and_regulariser(make: Callable[..., Config], tmp_path: Path) -> None:
    config = make(f"data.prompts.test={tmp_path}/more.txt", "evaluation.final_samples=4", "evaluation.steps=3")
    model = copied_architecture(config)
    assert counted(config, model)[names.SAMPLING] == 2 * 4 * 3, "base and policy, four samples, three steps"
    one = "evaluation.samples_per_prompt=1"
    rounds = make(f"data.prompts.validation={tmp_path}/more.txt", "evaluation.every=3", one)
    assert counted(rounds, model)[names.SAMPLING] == 3 * 2 * 5, "before the first step, after 3 and after the last"
    plain = counted(make(), model)[names.GRADIENT]
    sft = make("objective.sft={every: 3}", "data.manifest=absent.jsonl")
    assert counted(sft, model)[names.GRADIENT] == plain + 2 * BATCH


def test_reward_training_and_sft(make: Callable[..., Config]) -> None:
    head = ["backbone.adapter=null", "reward={space: latent, head: {dimensions: [a], blocks: [1]}}", "data.manifest=m"]
    pairs = make(*head, "objective={name: preference, loss: thurstone}")
    model = copied_architecture(pairs)
    assert counted(pairs, model) == {names.REWARD: 2 * STEPS * BATCH}
    assert counted(make("reward=null", "objective={name: sft}", "data.manifest=m"), model) == {
        names.GRADIENT: STEPS * BATCH
    }


@pytest.mark.parametrize(
    ("objective", "reads"), [("", 1), (", temporal_decay: 1.0", 2), (", frames: one, temporal_decay: 1.0", 1)]
)
def test_frames_that_are_scored_by_themselves_are_read_again(
    make: Callable[..., Config], objective: str, reads: int
) -> None:
    pixel = ["reward={space: pixel, path: absent}", f"objective={{name: instructvideo{objective}}}", "data.manifest=m"]
    config = make(*pixel)
    assert counted(config, copied_architecture(config))[names.REWARD] == reads * STEPS * BATCH
