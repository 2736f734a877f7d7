from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from prfl.backbone import LoraSpec, load_backbone
from prfl.reward import LatentReward, Normalisation, RewardAdapter, RewardCard, RewardHead
from prfl.utils.errors import PrflError
from tests.tiny import save_tiny_pipeline

SIGMA = torch.tensor([0.2, 0.9])
ADAPTER = RewardAdapter(rank=2, alpha=4.0, targets=("to_q", "ffn.net.2"))


def inputs(backbone, batch=2):
    generator = torch.Generator().manual_seed(0)
    condition = backbone.condition(["a red circle moves left", "a blue square"][:batch])
    return torch.randn(batch, *backbone.latent_shape(5, 16, 16), generator=generator), SIGMA[:batch], condition


def make(backbone, *, blocks=(0, 1), adapter=None, **head):
    torch.manual_seed(0)
    settings = dict(blocks=len(blocks), inner=16, heads=2, hidden=16, film=True)
    made = RewardHead(backbone.facts.widths[0], ["motion", "look"], **{**settings, **head})
    torch.nn.init.normal_(made.film.weight, std=0.1)
    return LatentReward(made, backbone, blocks, adapter=adapter)


def stir(backbone, name):
    """Give an adapter weights that matter (it is made as the identity)."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in backbone.parameters(name).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def test_gradient_in_the_latents_against_finite_differences(tiny_backbone):
    """Wan blocks compute partly in float32 whatever they are given, so the step is wide and the tolerance with it."""
    reward = make(tiny_backbone).freeze()
    latents, sigma, condition = inputs(tiny_backbone)
    latents.requires_grad_()
    reward(latents, sigma, condition)["motion"].sum().backward()
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ends = [reward(latents + h * direction, sigma, condition)["motion"].sum().double() for h in (1e-2, -1e-2)]
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-2, (latents.grad * direction).sum().double(), rtol=2e-2, atol=0)


def test_gradient_is_that_of_the_parts_by_plain_autograd(tiny_backbone):
    reward = make(tiny_backbone)
    reward.normalisation = Normalisation({"motion": 0.3, "look": 0.0}, {"motion": 2.0, "look": 1.0})
    latents, sigma, condition = inputs(tiny_backbone)
    one, two = (latents.clone().requires_grad_() for _ in range(2))
    reward(one, sigma, condition)["motion"].sum().backward()
    logits = reward.head(tiny_backbone.features(two, sigma, condition, [0, 1]), sigma)
    ((logits[:, 0] - 0.3) / 2.0).sum().backward()
    assert torch.equal(one.grad, two.grad) and one.grad.abs().max() > 0


def test_a_frozen_backbone_keeps_no_graph_for_head_training(tiny_backbone):
    reward = make(tiny_backbone)
    seen = []
    features = tiny_backbone.features
    tiny_backbone.features = lambda *args: seen.append(torch.is_grad_enabled()) or features(*args)
    latents, sigma, condition = inputs(tiny_backbone)
    logits = reward.logits(latents, sigma, condition)["look"]
    assert logits.requires_grad, "the head still learns"
    reward.logits(latents.requires_grad_(), sigma, condition)
    with torch.no_grad():
        assert not reward.logits(latents, sigma, condition)["look"].requires_grad
    assert seen == [False, True, False]


def test_the_adapter_makes_a_graph_only_while_it_trains(tiny_backbone):
    reward = make(tiny_backbone, adapter=ADAPTER)
    latents, sigma, condition = inputs(tiny_backbone)
    with reward.selected():
        reward.logits(latents, sigma, condition)["look"].sum().backward()
    names = [name for name, parameter in reward.parameters().items() if parameter.grad is not None]
    assert any(name.startswith("adapter.blocks.1.") and "lora_B" in name for name in names)
    assert not any(name.startswith("adapter.blocks.2.") for name in reward.parameters()), "blocks that it never runs"
    for parameter in reward.parameters().values():
        parameter.grad = None
    reward.freeze()
    with reward.selected():
        reward.logits(latents.requires_grad_(), sigma, condition)["look"].sum().backward()
    assert latents.grad is not None
    assert all(parameter.grad is None for parameter in reward.parameters().values())


def test_the_policys_adapter_does_not_reach_the_reward(tiny_backbone):
    reward = make(tiny_backbone)
    latents, sigma, condition = inputs(tiny_backbone)
    before = reward(latents, sigma, condition)["motion"]
    tiny_backbone.add_adapter("policy", LoraSpec(rank=2, alpha=4.0, targets=["to_q"]))
    stir(tiny_backbone, "policy")
    with tiny_backbone.adapter("policy"):
        assert torch.equal(reward(latents, sigma, condition)["motion"], before)
        assert tiny_backbone.active_adapter == "policy"
        with reward.selected():
            assert tiny_backbone.active_adapter is None
    # the planted error: features without the reward's own selection do see the policy
    with tiny_backbone.adapter("policy"):
        leaked = reward.head(tiny_backbone.features(latents, sigma, condition, [0, 1]), sigma)[:, 0]
    assert (leaked - before).abs().max() > 1e-6


def test_checkpointing_with_an_own_adapter_needs_the_context_until_backward(tiny_backbone):
    reward = make(tiny_backbone, adapter=ADAPTER)
    stir(tiny_backbone, "reward")
    latents, sigma, condition = inputs(tiny_backbone)

    def gradient(checkpointing):
        tiny_backbone.running.checkpointing = checkpointing
        leaf = latents.clone().requires_grad_()
        with reward.selected():
            reward(leaf, sigma, condition)["motion"].sum().backward()
        return leaf.grad

    torch.testing.assert_close(gradient("full"), gradient("none"))
    tiny_backbone.running.checkpointing = "full"
    score = reward(latents.clone().requires_grad_(), sigma, condition)["motion"].sum()
    with pytest.raises(PrflError, match="recomput|computed again"):
        score.backward()


def test_sigma_may_be_one_number(tiny_backbone):
    reward = make(tiny_backbone)
    latents, _, condition = inputs(tiny_backbone)
    one, many = torch.tensor(0.7), torch.full((2,), 0.7, dtype=torch.float64)
    assert torch.equal(reward(latents, one, condition)["look"], reward(latents, many, condition)["look"])


def test_scores_never_touch_the_vae(tiny_backbone):
    reward = make(tiny_backbone)
    latents, sigma, condition = inputs(tiny_backbone)
    del tiny_backbone.networks["vae"]
    reward(latents.requires_grad_(), sigma, condition)["look"].sum().backward()


@pytest.mark.parametrize("adapter", [None, ADAPTER])
@pytest.mark.parametrize("pooling", ["query", "mean"])
def test_round_trip_is_bit_exact_and_holds_no_backbone(tiny_backbone, tiny_pipeline_folder, tmp_path, adapter, pooling):
    reward = make(tiny_backbone, adapter=adapter, pooling=pooling)
    if adapter:
        stir(tiny_backbone, "reward")
    latents, sigma, condition = inputs(tiny_backbone)
    reward.calibrate({"motion": torch.tensor([0.0, 2.0, 1.0]), "look": torch.tensor([-1.0, 3.0])})
    reward.card = RewardCard(labels={"motion": "moves as asked"}, frames=(5, 17), accuracy={"motion": {"0.0-0.2": 0.9}})
    reward.save_pretrained(tmp_path / "reward")
    assert {path.name for path in (tmp_path / "reward").iterdir()} == {"README.md", "config.json", "reward.safetensors"}
    again = LatentReward.from_pretrained(tmp_path / "reward", load_backbone(tiny_pipeline_folder))
    for name, score in reward(latents, sigma, condition).items():
        assert torch.equal(again(latents, sigma, condition)[name], score)
    assert (again.normalisation, again.card, again.adapter) == (reward.normalisation, reward.card, adapter)
    with safe_open(tmp_path / "reward" / "reward.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == set(reward.parameters()), "the head and its adapter, and nothing else"
    assert not any(parameter.requires_grad for parameter in again.parameters().values())


def test_every_mismatch_is_named(tiny_backbone, tmp_path):
    make(tiny_backbone).save_pretrained(tmp_path / "reward")
    other = load_backbone(save_tiny_pipeline(tmp_path / "other", seed=1, num_attention_heads=4))
    other.facts = replace(other.facts, identity={**other.facts.identity, "vae_fingerprint": "0"})
    with pytest.raises(PrflError) as error:
        LatentReward.from_pretrained(tmp_path / "reward", other)
    for part in ("does not fit", "width: 24 there, 48 here", "transformer_fingerprint", "vae_fingerprint", "tiny-wan"):
        assert part in str(error.value)


def test_other_weights_of_the_same_shape_do_not_fit(tiny_backbone, tmp_path):
    make(tiny_backbone).save_pretrained(tmp_path / "reward")
    other = load_backbone(save_tiny_pipeline(tmp_path / "other", seed=1))
    with pytest.raises(PrflError, match="transformer_fingerprint"):
        LatentReward.from_pretrained(tmp_path / "reward", other)


def test_another_latent_normalisation_does_not_fit(tiny_backbone, tiny_pipeline_folder, tmp_path):
    make(tiny_backbone).save_pretrained(tmp_path / "reward")
    shutil.copytree(tiny_pipeline_folder, tmp_path / "other")
    config = tmp_path / "other" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latents_std": [1.0, 1.0, 1.0, 1.0]}))
    other = load_backbone(tmp_path / "other")
    with pytest.raises(PrflError, match="latents_std"):
        LatentReward.from_pretrained(tmp_path / "reward", other)


def test_another_place_of_the_same_model_does_fit(tiny_backbone, tiny_pipeline_folder, tmp_path):
    make(tiny_backbone).save_pretrained(tmp_path / "reward")
    moved = load_backbone(tiny_pipeline_folder)
    elsewhere = {**moved.facts.identity, "model_id": "elsewhere", "revision": "main"}
    moved.facts = replace(moved.facts, identity=elsewhere)
    LatentReward.from_pretrained(tmp_path / "reward", moved)


def test_broken_folders(tiny_backbone, tmp_path):
    folder = tmp_path / "reward"
    reward = make(tiny_backbone)
    reward.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "version": 99}))
    with pytest.raises(PrflError, match="version 99"):
        LatentReward.from_pretrained(folder, tiny_backbone)
    (folder / "config.json").write_text(json.dumps({**config, "format": "prfl-pixel-reward"}))
    with pytest.raises(PrflError, match="prfl-pixel-reward"):
        LatentReward.from_pretrained(folder, tiny_backbone)
    reward.save_pretrained(folder)
    (folder / "reward.safetensors").write_bytes((folder / "reward.safetensors").read_bytes()[:-4] + b"abcd")
    with pytest.raises(PrflError, match="not the file"):
        LatentReward.from_pretrained(folder, tiny_backbone)
    (folder / "reward.safetensors").unlink()
    with pytest.raises(PrflError, match="no reward.safetensors"):
        LatentReward.from_pretrained(folder, tiny_backbone)


def test_a_crash_while_writing_leaves_the_old_reward(tiny_backbone, tmp_path, monkeypatch):
    folder = tmp_path / "reward"
    reward = make(tiny_backbone)
    reward.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(PrflError, match="No space"):
        reward.save_pretrained(folder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_neither_a_folder_nor_a_repository(tiny_backbone, tmp_path):
    with pytest.raises(PrflError, match="there is no such folder"):
        LatentReward.from_pretrained(tmp_path / "nothing" / "here" / "at all", tiny_backbone)


def test_a_run_that_has_no_reward_yet_is_not_sought_on_the_hub(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "myrun").mkdir()
    monkeypatch.setattr("prfl.reward.checkpoint.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(PrflError, match="there is no such folder"):
        LatentReward.from_pretrained("myrun/reward", tiny_backbone)


@pytest.mark.parametrize("blocks", [[], [0, 3], [-1]])
def test_blocks_that_do_not_exist(tiny_backbone, blocks):
    with pytest.raises(PrflError, match="blocks 0 to 2"):
        LatentReward(RewardHead(tiny_backbone.facts.widths[0], ["motion"]), tiny_backbone, blocks)


def test_two_rewards_on_one_backbone(tiny_backbone, tiny_pipeline_folder, tmp_path):
    reward = make(tiny_backbone, adapter=ADAPTER)
    stir(tiny_backbone, "reward")
    reward.save_pretrained(tmp_path / "reward")
    again = LatentReward.from_pretrained(tmp_path / "reward", tiny_backbone, adapter_name="reward2")
    args = inputs(tiny_backbone)
    assert torch.equal(again(*args)["motion"], reward(*args)["motion"])
