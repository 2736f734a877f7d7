"""A model of two networks: trained, resumed, saved and exported by the networks' names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prfl.backbone import Backbone, LoraSpec
from prfl.backbone.families import FAMILIES
from prfl.config import dump_resolved
from prfl.config.schema import Config
from prfl.config.sections.training import TrainingConfig
from prfl.export.run import export_run
from prfl.factory.backbone import POLICY, build_backbone
from prfl.factory.policy import load_policy, save_policy, weights_hash
from prfl.factory.provenance import Moment
from prfl.objective.loss import RewardLoss
from prfl.objective.methods.vader import Vader
from prfl.objective.reward_gradient import RewardGradient
from prfl.reward import LatentReward, RewardAdapter, RewardHead
from prfl.reward.scorer import LatentScorer
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.solvers import euler
from prfl.training.distributed import make_accelerator
from prfl.training.loop import fit
from prfl.training.run_folder import RunFolder
from prfl.utils.errors import PrflError
from tests.two_networks import TWO, Network, save_two_networks

PROMPTS = ["a circle", "a blue square"]
SHAPE = (6, 1, 2, 2)
CHAIN = euler(chain_sigmas(4, 1.0))  # sigmas 1, 0.75 are the first network's; 0.5, 0.25 the second's


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(FAMILIES, "two", TWO)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    (tmp_path / "run").mkdir()
    return Config.model_validate(
        {
            "version": 1, "run": str(tmp_path / "run"), "seed": 0,
            "backbone": {
                "model": str(save_two_networks(tmp_path / "model")),
                "adapter": {"rank": 2, "alpha": 2, "targets": ["to_q"]},
            },
            "data": {
                "prompts": {"train": str(prompts), "validation": str(prompts), "test": str(prompts)},
                "cache": str(tmp_path / "cache"), "frames": 1, "height": 8, "width": 8, "fps": 8,
            },
            "reward": {"space": "latent", "path": str(tmp_path / "reward")},
            "rollout": {"steps": 2}, "objective": {"name": "prfl"},
            "training": {"steps": 1, "batch": 1, "learning_rate": 1e-3}, "evaluation": {"every": 0, "final_samples": 1},
        }
    )  # fmt: skip


def full(config: Config) -> Config:
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"train": "full", "adapter": None})})


def stir(model: Backbone, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters(POLICY).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def objective(config: Config) -> RewardGradient:
    """The whole chain, through both networks, for a reward that is read by the second one."""
    model = build_backbone(config)
    stir(model)
    torch.manual_seed(0)
    head = RewardHead(6, ["motion"], blocks=1, inner=8, heads=2, hidden=8)
    reward = LatentReward(head, model, [0], adapter=RewardAdapter(2, 2.0, ("to_q",))).freeze()
    loss = RewardLoss({"motion": 1.0}, shape="linear", scale=1.0)
    return RewardGradient(model, Vader(CHAIN, 0, 4), LatentScorer(reward), loss, PROMPTS, SHAPE, distance_every=0)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_gradient_reaches_both_networks_as_by_plain_autograd(config: Config, train: str) -> None:
    step = objective(config if train == "lora" else full(config))
    step.accumulate(0, [0, 1])
    ours = {name: p.grad for name, p in step.parameters().items()}
    assert {name.partition(".")[0] for name in ours} == {"blocks", "transformer_2"}

    model, leaves = step.backbone, step.parameters()
    _, condition, x = step.draw(0, [0, 1])
    with model.adapter(POLICY):
        for i in range(CHAIN.steps):
            sigma = CHAIN.sigmas[i].float()
            x = x + (CHAIN.sigmas[i + 1] - CHAIN.sigmas[i]) * model.velocity(x, sigma, condition)
    scores = step.scorer(x, torch.zeros(2), condition, 0)
    joint = torch.autograd.grad(-scores["motion"].mean(), list(leaves.values()))
    size = max(float(gradient.abs().max()) for gradient in joint)
    for name, gradient in zip(leaves, joint, strict=True):
        torch.testing.assert_close(ours[name], gradient.to(ours[name]), rtol=0, atol=2e-5 * size, msg=name)
        assert gradient.abs().max() > 0, name


def test_two_and_two_steps_equal_four_bit_for_bit(config: Config, tmp_path: Path) -> None:
    def go(folder: Path, steps: int) -> dict[str, torch.Tensor]:
        settings = TrainingConfig(steps=steps, batch=2, learning_rate=1e-2, ema_decay=0.9, trackers=[])
        run = RunFolder(folder)
        fit(objective(config), settings, run, accelerator=make_accelerator(run, "cpu", []))
        return load_file(run.checkpoints / f"step-{steps:06d}" / "weights.safetensors")

    straight = go(tmp_path / "straight", 4)
    go(tmp_path / "broken", 2)
    broken = go(tmp_path / "broken", 4)
    assert {"blocks.0.to_q.lora_A.weight", "transformer_2.blocks.1.to_q.lora_B.weight"} <= straight.keys()
    assert straight.keys() == broken.keys() and all(torch.equal(straight[name], broken[name]) for name in straight)


def test_a_saved_adapter_holds_both(config: Config) -> None:
    model, again = build_backbone(config), build_backbone(config)
    stir(model)
    save_policy(config.run, model, config)
    load_policy(config, again)
    for name, parameter in model.parameters(POLICY).items():
        assert torch.equal(parameter, again.parameters(POLICY)[name]), name
    (config.run / "config.yaml").write_text(dump_resolved(config))
    with pytest.raises(PrflError, match="transformer and transformer_2 cannot be written as one file.*\n?.*--merged"):
        export_run(config.run)


def merged_network(folder: Path, name: str) -> Network:
    return Network.from_pretrained(folder / name)


def test_merged_weights_are_those_of_both(config: Config) -> None:
    model = build_backbone(config)
    stir(model)
    save_policy(config.run, model, config)
    (config.run / "config.yaml").write_text(dump_resolved(config))
    out = export_run(config.run, merged=True)
    x = torch.randn(3, 6)
    with model.adapter(POLICY), torch.no_grad():
        for name in ("transformer", "transformer_2"):
            torch.testing.assert_close(merged_network(out, name)(x), model.computing[name](x))  # type: ignore[attr-defined]
    card = (out / "README.md").read_text()
    assert 'subfolder="transformer_2")' in card and "transformer=transformer, transformer_2=transformer_2)" in card


def test_all_weights_are_a_folder_for_each(config: Config) -> None:
    config = full(config)
    model, again = build_backbone(config), build_backbone(config)
    stir(model)
    save_policy(config.run, model, config, Moment(1, 1, "a"))
    load_policy(config, again)
    for name, parameter in model.parameters(POLICY).items():
        assert torch.equal(parameter, again.parameters(POLICY)[name]), name
    before = weights_hash(config)
    with torch.no_grad():
        model.parameters(POLICY)["transformer_2.blocks.0.to_q.bias"].add_(1)
    save_policy(config.run, model, config, Moment(1, 1, "a"))
    assert weights_hash(config) != before, "the second network counts"

    # A crash between the two, and a policy of which one is gone.
    stamp = config.run / "transformer_2/prfl.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "step": 7}))
    with pytest.raises(PrflError, match="the transformer_2 of the policy is missing, or not of the moment"):
        load_policy(config, again)
    shutil.rmtree(stamp.parent)
    with pytest.raises(PrflError, match="the transformer_2 of the policy is missing"):
        load_policy(config, again)


def test_a_reward_with_an_adapter_on_both_loads(config: Config, tmp_path: Path) -> None:
    model = build_backbone(config)
    head = RewardHead(6, ["motion"], blocks=1, inner=8, heads=2, hidden=8)
    reward = LatentReward(head, model, [1], adapter=RewardAdapter(2, 2.0, ("to_q",)))
    reward.save_pretrained(tmp_path / "reward")
    again = LatentReward.from_pretrained(tmp_path / "reward", build_backbone(config))
    assert "adapter.transformer_2.blocks.1.to_q.lora_A.weight" in again.state()
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in reward.state().items())


def test_an_adapter_that_fits_one_alone_is_refused_before_either_changes(config: Config) -> None:
    model = build_backbone(config)
    model.networks["transformer_2"].blocks[0].to_k = torch.nn.Linear(6, 6)
    with pytest.raises(PrflError, match="match no linear layer"):
        model.add_adapter("other", LoraSpec(1, 1, ["to_k"]))
    with pytest.raises(PrflError, match="no adapter 'other'"):
        model.parameters("other")
