"""What a config says of two experts: which are trained, how fast, under which guidance; and what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from prfl.backbone import Backbone, LoraSpec, load_backbone
from prfl.backbone.condition import unconditional
from prfl.backbone.experts import check_read, expert_of, highest_read, is_high
from prfl.backbone.network import base_blocks, base_weights, predictors
from prfl.backbone.turns import weights_of
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.estimate.parts import base_bytes, sum_bytes, waiting_bytes
from prfl.evaluation.reward_eval import levels, up_to
from prfl.export.run import write_merged
from prfl.factory.backbone import POLICY, build_architecture, build_backbone
from prfl.factory.evaluation import sampling_settings
from prfl.factory.objective import build_method, build_sft
from prfl.factory.policy import load_policy, save_policy
from prfl.factory.rollout import build_scale, build_schedule
from prfl.objective.loss import RewardLoss
from prfl.objective.preference import draw_sigma
from prfl.objective.reward_gradient import RewardGradient
from prfl.reward import LatentReward, RewardAdapter, RewardHead
from prfl.reward.scorer import LatentScorer
from prfl.rollout.guidance import Guidance
from prfl.rollout.plan import Clean
from prfl.rollout.sampling import SamplingSettings, sample, start_noise
from prfl.training.loop import group_sizes
from prfl.training.optimizer import adamw, apply
from prfl.utils.errors import PrflError
from tests.objective.parts import PROMPTS, stir
from tests.objective.test_sft import dataset
from tests.slow import slow_unless
from tests.wan_experts import BOUNDARY, save_tiny_experts
from tests.wan_image import SHAPE

STEPS = 5  # at shift 3 the sigmas are 1, 0.92, 0.82, 0.67, 0.43, 0: two steps are the high-noise expert's


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """make("a.b=value", ...): the whole chain of a model of two experts, unless changed."""
    folder = tmp_path_factory.mktemp("experts")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    config = {
        "version": 1, "run": str(folder / "run"), "seed": 0,
        "backbone": {
            "model": str(save_tiny_experts(folder / "tiny-a14b")), "device": "cpu",
            "adapter": {"rank": 2, "alpha": 2, "targets": ["to_q", "to_v"]},
        },
        "data": {
            "prompts": {"train": str(folder / "prompts.txt")}, "cache": str(folder), "frames": 9, "height": 16,
            "width": 16, "fps": 8,
        },
        "reward": {"space": "latent", "path": str(folder / "absent")}, "rollout": {"steps": STEPS},
        "objective": {"name": "full_chain"}, "training": {"steps": 5, "batch": 2, "learning_rate": 1e-4},
        "evaluation": {"every": 0},
    }  # fmt: skip
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(config))
    return lambda *overrides: load_config(Path(path), overrides)


def networks_of(names: Iterable[str]) -> set[str]:
    return {"transformer_2" if name.startswith("transformer_2.") else "transformer" for name in names}


# ------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(("train", "network"), [("high", "transformer"), ("low", "transformer_2")])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_one_expert_is_trained_alone(
    make: Callable[..., Config], tmp_path: Path, train: str, network: str, weights: str
) -> None:
    whole = ["backbone.train=full", "backbone.adapter=null"] if weights == "full" else []
    config = make(f"backbone.experts={{train: [{train}]}}", f"run={tmp_path}", *whole)
    model = build_backbone(config)
    assert networks_of(model.parameters(POLICY)) == {network}
    stir(model, POLICY, seed=1)
    latents, condition = torch.randn(2, *SHAPE), model.condition(PROMPTS[:2])
    sigma = torch.tensor([0.95, 0.3])
    base = model.velocity(latents, sigma, condition)
    with model.adapter(POLICY):
        policy = model.velocity(latents, sigma, condition)
    changed = [not torch.equal(base[row], policy[row]) for row in range(2)]
    assert changed == [train == "high", train == "low"]

    save_policy(tmp_path, model, config)
    again = build_backbone(config)
    load_policy(config, again, tmp_path / ("policy.safetensors" if weights == "lora" else "transformer"))
    with again.adapter(POLICY):
        assert torch.equal(again.velocity(latents, sigma, condition), policy)
    if weights == "lora":
        assert [path.name for path in write_merged(config.model_copy(update={"run": tmp_path}), tmp_path / "out")] == [
            network
        ]


def test_one_expert_is_resident(make: Callable[..., Config]) -> None:
    """The whole chain of a policy: the same numbers, and the other's weights in host memory."""
    both, one = (
        build_backbone(make("backbone.checkpointing=full", f"backbone.experts={{resident: {resident}}}"))
        for resident in ("both", "one")
    )
    assert both.running.turns is None and one.running.turns is not None
    settings = sampling_settings(make())
    assert torch.equal(*(sample(model, PROMPTS[:2], [0, 0], settings) for model in (both, one)))
    assert one.running.turns.swaps == 2

    config = make("backbone.checkpointing=full", "backbone.experts={resident: one}", "backbone.device=cuda")
    shapes = build_architecture(config)
    whole, other = (sum_bytes(base_weights(network)) for network in predictors(shapes).values())
    of_blocks = sum_bytes(weights_of(base_blocks(shapes)[:3]).values())
    assert whole == other and 0.5 * whole < of_blocks < whole
    assert base_bytes(config, shapes) == 2 * whole - of_blocks and waiting_bytes(config, shapes) >= 2 * of_blocks
    on_cpu = make("backbone.checkpointing=full", "backbone.experts={resident: one}")
    assert base_bytes(on_cpu, shapes) == 2 * whole + of_blocks and waiting_bytes(on_cpu, shapes) == 0
    assert base_bytes(make(), shapes) == 2 * whole


# ------------------------------------------------------------------------------------------------- the gradient

SCALES = [4.0, 4.0, 3.0, 3.0, 3.0]  # of each step
EACH = ["rollout.guidance={scale: {high: 4.0, low: 3.0}, gradient: cond}"]
CHAINED = {
    "full_chain": "{name: full_chain}",
    "dense_process": "{name: dense_process, rewards: 2, handoff: clean, credit: chain, beta: 1.0}",
}


def objective_of(config: Config) -> RewardGradient:
    """In float64, with a head that reads the low-noise expert through an adapter of its own."""
    model = load_backbone(config.backbone.model, torch.float64)
    model.running.checkpointing = "full"
    experts = config.backbone.experts
    networks = None if experts is None else ["transformer"]
    model.add_adapter(POLICY, LoraSpec(rank=2, alpha=2.0, targets=["to_q", "to_v"], networks=networks))
    stir(model, POLICY, seed=3)
    torch.manual_seed(0)
    head = RewardHead(24, ["motion"], blocks=1, inner=16, heads=2, hidden=16).double()
    reward = LatentReward(head, model, [1], adapter=RewardAdapter(rank=2, alpha=4.0, targets=("to_q",)))
    assert networks_of(model.parameters("reward")) == {"transformer_2"}
    stir(model, "reward", seed=4)
    scorer = LatentScorer(reward.freeze())
    loss = RewardLoss({"motion": 1.0}, shape="linear", scale=1.0)
    guidance = Guidance(build_scale(config.rollout.guidance.scale), config.rollout.guidance.gradient)
    objective = RewardGradient(
        model, build_method(config, model), scorer, loss, PROMPTS, SHAPE, distance_every=0, guidance=guidance
    )
    draw = objective.draw

    def in_double(step: int, indices: list[int]) -> tuple:
        prompts, condition, start = draw(step, indices)
        return prompts, condition, start.double()

    objective.draw = in_double  # type: ignore[method-assign]
    return objective


def by_one_graph(objective: RewardGradient, sigmas: Tensor) -> dict[str, Tensor | None]:
    """The chain as a plain loop: each step by its expert at that expert's scale, the reward where it is read."""
    seeds, trains = objective.plan(0).seeds, objective.method.method.plan(0).plan.trains  # type: ignore[attr-defined]
    model = objective.backbone
    model.running.checkpointing = "none"
    _, condition, x = objective.draw(0, [0, 1])
    empty, loss = model.condition(unconditional(condition.asks)), torch.zeros((), dtype=torch.float64)
    with model.adapter(POLICY):
        for i, scale in enumerate(SCALES):
            sigma = sigmas[i]
            with torch.no_grad():
                unguided = model.velocity(x, sigma, empty)
            with torch.set_grad_enabled(i >= min(trains)):
                velocity = unguided + scale * (model.velocity(x, sigma, condition) - unguided)
                for node, state in ((Clean(i), x - sigma * velocity), (i + 1, x + (sigmas[i + 1] - sigma) * velocity)):
                    if node in seeds:
                        with objective.scorer.selected():
                            scores = objective.scorer(state, torch.zeros(2), condition, 0)
                        loss = loss - seeds[node] * scores["motion"].mean()
                x = state
    leaves = objective.parameters()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))


@pytest.mark.parametrize(
    ("method", "train"),
    slow_unless(
        lambda case: case in (("full_chain", "both"), ("dense_process", "high")),
        [(method, train) for method in CHAINED for train in ("both", "high")],
    ),
)
def test_the_chain_takes_the_low_experts_reward_to_the_high_one(
    make: Callable[..., Config], method: str, train: str
) -> None:
    chosen = ["backbone.experts={train: [high]}"] if train == "high" else []
    config = make(f"objective={CHAINED[method]}", *EACH, *chosen)
    objective = objective_of(config)
    objective.accumulate(0, [0, 1])
    ours = {name: parameter.grad for name, parameter in objective.parameters().items()}
    sigmas = build_schedule(config, objective.backbone).sigmas
    assert is_high(objective.backbone.facts, sigmas).tolist() == [True, True, False, False, False, False]
    assert networks_of(ours) == ({"transformer", "transformer_2"} if train == "both" else {"transformer"})
    joint = by_one_graph(objective, sigmas)
    size = max(float(gradient.abs().max()) for gradient in joint.values() if gradient is not None)
    of_high = max(float(g.abs().max()) for name, g in joint.items() if g is not None and "transformer_2" not in name)
    assert size > 1e-6 and of_high > 1e-6, "a reward that the low-noise expert reads moves the high-noise one"
    for name, gradient in joint.items():
        assert gradient is not None and ours[name] is not None, name
        assert float((ours[name] - gradient).abs().max()) < 1e-9 * size, name


def test_a_step_of_one_expert_leaves_the_other_as_it_is(make: Callable[..., Config]) -> None:
    """No gradient, so that AdamW skips it: neither momentum nor weight decay moves it."""
    config = make("objective={name: prfl, handoff: clean}", "training.steps=20")
    objective = objective_of(config)
    parameters = objective.parameters()
    optimizer = adamw(list(parameters.values()), weight_decay=0.1)
    sigmas, moved = build_schedule(config, objective.backbone).sigmas, set()
    for step in range(20):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = None
        objective.accumulate(step, [0])
        apply(optimizer, 1e-2)
        (k,) = objective.plan(step).plan.trains
        expert = "transformer" if bool(is_high(objective.backbone.facts, sigmas[k])) else "transformer_2"
        assert networks_of(name for name, p in parameters.items() if p.grad is not None) == {expert}
        changed = networks_of(name for name, p in parameters.items() if not torch.equal(p, before[name]))
        assert changed == {expert}
        moved |= changed
        if len(moved) == 2 and step > 3:
            return
    raise AssertionError("both experts were drawn")


def test_each_expert_learns_at_its_rate() -> None:
    names = ["blocks.0.a", "blocks.1.a", "transformer_2.blocks.0.a"]
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in names]
    rates = {"high": 1e-2, "low": 1e-3}
    sizes = group_sizes(names, rates, lambda name: "low" if name.startswith("transformer_2") else "high")
    optimizer = adamw(parameters, sizes=sizes)
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    apply(optimizer, list(rates.values()))
    torch.testing.assert_close([p.item() for p in parameters], [-1e-2, -1e-2, -1e-3])
    assert list(optimizer.state_dict()["state"]) == [0, 1, 2], "checkpoints count them in their order"
    with pytest.raises(PrflError, match="nothing is trained at the rate of low"):
        group_sizes(names[:2], rates, lambda name: "high")


def test_samples_are_guided_by_each_experts_scale(make: Callable[..., Config]) -> None:
    config = make("evaluation.guidance_scale={high: 4.0, low: 3.0}")
    model, settings = build_backbone(config), sampling_settings(config)
    condition, empty = model.condition(PROMPTS[:1]), model.condition([""])
    sigmas = settings.chain(model, SHAPE).sigmas
    x = start_noise(SHAPE, 0, PROMPTS[:1], [0])
    with torch.no_grad():
        for i, scale in enumerate(SCALES):
            unguided = model.velocity(x, sigmas[i], empty)
            x = x + (sigmas[i + 1] - sigmas[i]) * (
                unguided + scale * (model.velocity(x, sigmas[i], condition) - unguided)
            )
    torch.testing.assert_close(sample(model, PROMPTS[:1], [0], settings), x.float(), rtol=1e-4, atol=1e-5)
    assert SamplingSettings.read(json.loads(json.dumps(asdict(settings)))) == settings


@pytest.mark.parametrize("train", ["high", "low"])
def test_sft_of_one_expert_draws_its_noise_levels(
    make: Callable[..., Config], train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft = ["reward=null", "objective={name: sft}", "data.manifest=absent.jsonl"]
    configs = [make(*sft, f"backbone.experts={{train: {each}}}") for each in (f"[{train}]", "[high, low]")]
    models = [build_backbone(config) for config in configs]
    objectives = [build_sft(config, model, dataset(model)) for config, model in zip(configs, models, strict=True)]
    (one, both), facts = (objective.draw(0, range(600)).sigma for objective in objectives), models[0].facts
    assert is_high(facts, one).tolist() == [train == "high"] * 600
    there = both[is_high(facts, both) == (train == "high")]
    assert 100 < len(there) < 500
    for share in (0.1, 0.5, 0.9):  # spread as they were
        torch.testing.assert_close(one.quantile(share), there.quantile(share), rtol=0, atol=0.05)
    objectives[0].accumulate(0, range(4))
    assert all(parameter.grad is not None for parameter in objectives[0].parameters().values())
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr("prfl.utils.rng.uniform", lambda *draw: ends)
    assert is_high(facts, objectives[0].draw(0, [0, 1]).sigma).tolist() == [train == "high"] * 2


# ------------------------------------------------------------------------------------------------- what is refused

PRFL = "objective={name: prfl}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([PRFL], r"reads the reward at sigma 0.923, .* below 0.875[\s\S]*steps_range: \[0.2, 1.0\], or handoff: clean"),
        (
            [PRFL, "backbone.experts={train: [high]}", "objective.handoff=clean"],
            r"backbone.experts.train: step \d of the run trains at sigma .* where the low-noise[\s\S]*\[0.0, 0.4\]",
        ),
        (
            [PRFL, "backbone.experts={train: [low]}", "objective.handoff=clean"],
            r"backbone.experts.train: step \d of the run trains at sigma .* the high-noise[\s\S]*\[0.4, 1.0\]",
        ),
        (
            ["backbone.experts={resident: one}"],
            r"experts.resident: a graph that is not checkpointed[\s\S]*checkpointing: full",
        ),
        (
            ["backbone.experts={resident: one}", "backbone.checkpointing=full", "backbone.compile=true"],
            r"experts.resident: compiled blocks do not wait[\s\S]*compile: false",
        ),
        (
            ["backbone.experts={resident: one}", "backbone.train=full", "backbone.adapter=null"],
            r"experts.resident: all weights are trained[\s\S]*train: lora",
        ),
        (
            ["backbone.experts={train: [low]}", "training.learning_rate={high: 2e-6, low: 5e-6}"],
            r"training.learning_rate: the low-noise expert alone is trained[\s\S]*give one number, as 5e-06",
        ),
    ],
)
def test_what_does_not_fit_two_experts(make: Callable[..., Config], overrides: list[str], message: str) -> None:
    config = make("training.steps=20", *overrides)
    with pytest.raises(PrflError, match=message):
        build_method(config, build_backbone(config))


@pytest.mark.parametrize(
    ("train", "part"), [("high, low", "[0.2, 1.0]"), ("high", "[0.0, 0.4]"), ("low", "[0.4, 1.0]")]
)
def test_what_is_advised_does(make: Callable[..., Config], train: str, part: str) -> None:
    handoff = "next" if train != "high" else "clean"
    config = make(
        f"objective={{name: prfl, steps_range: {part}, handoff: {handoff}}}", f"backbone.experts={{train: [{train}]}}",
        "training.steps=40",
    )  # fmt: skip
    model = build_backbone(config)
    method = build_method(config, model)
    plans = [method.plan(step) for step in range(40)]
    drawn = {k for plan in plans for k in plan.plan.trains}
    assert drawn == {"high, low": {1, 2, 3, 4}, "high": {0, 1}, "low": {2, 3, 4}}[train]


@pytest.mark.parametrize(
    "override",
    [
        "backbone.experts={train: [high]}",
        "training.learning_rate={high: 1e-6, low: 1e-6}",
        "rollout.guidance={scale: {high: 4, low: 3}, gradient: cond}",
        "evaluation.guidance_scale={high: 4, low: 3}",
    ],
)
def test_a_model_of_one_network_has_no_experts(
    make: Callable[..., Config], tiny_pipeline_folder: Path, override: str
) -> None:
    config = make(f"backbone.model={tiny_pipeline_folder}", override)
    key = override.partition("=")[0] if "rollout" not in override else "rollout.guidance.scale"
    with pytest.raises(PrflError, match=f"{key}: tiny-wan has one network, and no experts"):
        build_backbone(config)


# ------------------------------------------------------------------------------------------------- what a head reads


def test_a_head_reads_below_the_boundary_alone(make: Callable[..., Config]) -> None:
    facts = build_backbone(make()).facts
    highest = highest_read(facts)
    assert highest < BOUNDARY and highest == pytest.approx(BOUNDARY, abs=1e-6)
    check_read(facts, torch.tensor([0.0, highest]))
    with pytest.raises(PrflError, match="reads the low-noise expert, below sigma 0.875, and is asked at 0.9"):
        check_read(facts, torch.tensor([0.1, 0.9]))
    for sampling in ("uniform", "shifted", "mixture"):
        sigma = draw_sigma(sampling, 5.0, 0, 3, list(range(4000)), highest)
        assert float(sigma.max()) <= highest and float(sigma.max()) > 0.98 * highest and float(sigma.min()) < 0.01
    shifted = draw_sigma("shifted", 5.0, 0, 3, list(range(4000)), highest)
    whole = draw_sigma("shifted", 5.0, 0, 3, list(range(4000)))
    below = whole[whole <= highest]
    torch.testing.assert_close(shifted.quantile(0.5), below.quantile(0.5), rtol=0, atol=0.02)  # spread as they were
    read = up_to(levels([1.0, 0.8, 0.0]), highest)
    assert max(level.high for level in read) == highest and read[-1].low == 0.0
    assert [level.label for level in read if level.kind == "bin"][-2:] == ["0.8-0.85", "0.85-0.875"]
    assert up_to(levels([1.0]), 1.0) == levels([1.0])


def test_parameters_are_of_the_expert_of_their_network(make: Callable[..., Config], tiny_backbone: Backbone) -> None:
    facts = build_backbone(make()).facts
    assert [expert_of(facts, name) for name in ("blocks.0.a", "transformer_2.blocks.0.a")] == ["high", "low"]
    assert expert_of(tiny_backbone.facts, "blocks.0.a") == ""
