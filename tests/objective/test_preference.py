from __future__ import annotations

import pytest
import torch

from prfl.data.dataset import LatentDataset, PairDataset
from prfl.data.examples import examples
from prfl.objective import Objective
from prfl.objective.pixel_preference import PixelPreference
from prfl.objective.preference import Preference, draw_sigma
from prfl.reward import LatentReward, PixelNetwork, PixelReward, RewardAdapter, RewardHead
from prfl.utils.errors import PrflError

PROMPTS = ["a red circle", "a blue square"]
NAN = float("nan")


def dataset(backbone, count=16, labels=None):
    """Videos whose label is planted in them: good ones are brighter in channel 0.  Half of each prompt are good."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, *backbone.latent_shape(5, 16, 16), generator=generator)
    good = torch.arange(count) % 4 < 2
    latents[:, 0] += torch.where(good, 1.0, -1.0)[:, None, None, None]
    prompts = [PROMPTS[row % 2] for row in range(count)]
    conditions = {prompt: backbone.condition([prompt]) for prompt in ["", *PROMPTS]}
    labels = {"good": good.float(), "other": (torch.arange(count) % 8 < 4).float()} if labels is None else labels
    return LatentDataset(
        latents=latents, video=torch.arange(count), labels=labels, prompts=prompts, conditions=conditions,
        device=backbone.facts.device, skipped=[],
    )  # fmt: skip


def pairs(backbone):
    videos = dataset(backbone)
    a, b = torch.tensor([0, 1, 4]), torch.tensor([2, 3, 0])
    return PairDataset(
        latents=videos.latents,
        a=a,
        b=b,
        preference={"good": torch.tensor([1.0, 1.0, 0.5])},
        prompts=[videos.prompts[row] for row in a.tolist()],
        conditions=videos.conditions,
        device=videos.device,
        skipped=[],
    )


def latent_reward(backbone, dimensions=("good",), adapter=None):
    torch.manual_seed(0)
    head = RewardHead(backbone.facts.widths[0], list(dimensions), blocks=2, inner=16, heads=2, hidden=16)
    return LatentReward(head, backbone, [0, 1], adapter=adapter)


def pixel_reward(dimensions=("good",)):
    torch.manual_seed(0)
    return PixelReward(PixelNetwork(16, list(dimensions), size=16, hidden=8, inner=16))


def gradients(objective):
    return {name: p.grad.clone() for name, p in objective.parameters().items() if p.grad is not None}


def clear(objective):
    for parameter in objective.parameters().values():
        parameter.grad = None


# ------------------------------------------------------------------------------------------------------ what is drawn


def test_sigma_sampling():
    indices = list(range(800))
    even, shifted, mixture = (draw_sigma(kind, 5.0, 0, 3, indices) for kind in ("uniform", "shifted", "mixture"))
    torch.testing.assert_close(even.mean(), torch.tensor(0.5), atol=0.04, rtol=0)
    torch.testing.assert_close(shifted, 5 * even / (1 + 4 * even), rtol=1e-5, atol=1e-6)
    share = ((mixture - shifted).abs() < 1e-6).double().mean()
    assert 0.4 < share < 0.6 and ((mixture == even) | (mixture == shifted)).all()
    assert torch.equal(draw_sigma("mixture", 5.0, 0, 3, indices[7:9]), mixture[7:9])


def test_examples_of_labels(tiny_backbone):
    labels = {"good": torch.tensor([1.0, NAN, 0.0, NAN]), "other": torch.tensor([NAN, NAN, 1.0, 0.0])}
    found = examples(dataset(tiny_backbone, 4, labels), "bce", ["good", "other"])
    assert found.sides[0].tolist() == [0, 2, 3], "a video without any label is left out"
    assert examples(dataset(tiny_backbone, 4, labels), "bce", ["good"]).sides[0].tolist() == [0, 2]


def test_examples_of_pairs_stay_within_a_prompt(tiny_backbone):
    videos = dataset(tiny_backbone, 8)
    found = examples(videos, "bradley_terry", ["good"])
    a, b = found.sides
    assert len(found) == 8, "two prompts with two good and two bad videos each"
    for row_a, row_b, prompt, target in zip(a, b, found.prompts, found.targets["good"], strict=True):
        assert videos.prompts[row_a] == videos.prompts[row_b] == prompt
        assert target == float(videos.labels["good"][row_a] > videos.labels["good"][row_b])
    tied = examples(videos, "rao_kupper", ["good"])
    assert len(tied) == 12 and (tied.targets["good"] == 0.5).sum() == 4


def test_examples_of_a_pair_manifest(tiny_backbone):
    found = examples(pairs(tiny_backbone), "rao_kupper", ["good"])
    assert [side.tolist() for side in found.sides] == [[0, 1, 4], [2, 3, 0]]
    assert len(examples(pairs(tiny_backbone), "thurstone", ["good"])) == 2, "a tie alone teaches it nothing"
    with pytest.raises(PrflError, match="bce needs labels"):
        examples(pairs(tiny_backbone), "bce", ["good"])


def test_mistakes_in_the_data(tiny_backbone):
    with pytest.raises(PrflError, match="no label 'god'.*\n.*did you mean 'good'"):
        examples(dataset(tiny_backbone), "bce", ["god"])
    with pytest.raises(PrflError, match="nothing in the data"):
        examples(dataset(tiny_backbone, 2), "bradley_terry", ["good"])
    with pytest.raises(PrflError, match="nothing in the data"):
        examples(dataset(tiny_backbone, 4, {"good": torch.full((4,), NAN)}), "bce", ["good"])


def test_both_sides_of_a_pair_get_the_same_sigma_and_noise(tiny_backbone):
    reward, videos = latent_reward(tiny_backbone), dataset(tiny_backbone)
    seen = []
    logits = reward.logits
    reward.logits = lambda *args: seen.append(args) or logits(*args)
    objective = Preference(reward, videos, seed=0, loss="thurstone")
    objective.accumulate(0, [0, 1, 2])
    noisy, sigma, condition = seen[0]
    assert len(noisy) == len(sigma) == len(condition) == 6
    batch, drawn_sigma, noise = objective.draw(0, [0, 1, 2])
    assert torch.equal(sigma[:3], sigma[3:]) and torch.equal(sigma[:3], drawn_sigma)
    wide = drawn_sigma.reshape(3, 1, 1, 1, 1)
    for side in range(2):
        half = slice(3 * side, 3 * side + 3)
        torch.testing.assert_close(noisy[half] - (1 - wide) * videos.latents[batch.rows[half]], wide * noise)
    assert len(set(drawn_sigma.tolist())) == 3, "and another for each pair"


# -------------------------------------------------------------------------------------------------- gradients, learning


@pytest.mark.parametrize("loss", ["bce", "bradley_terry", "rao_kupper", "thurstone"])
def test_how_a_batch_is_split_changes_nothing(tiny_backbone, loss):
    objective = Preference(latent_reward(tiny_backbone, ["good", "other"]), dataset(tiny_backbone), seed=0, loss=loss)
    assert isinstance(objective, Objective)
    whole = objective.accumulate(5, [20, 21, 22, 23])
    expected = gradients(objective)
    clear(objective)
    parts = [objective.accumulate(5, part) for part in ([20, 21], [22, 23])]
    for name, gradient in gradients(objective).items():
        torch.testing.assert_close(gradient / 2, expected[name], rtol=1e-4, atol=1e-6)
    assert whole["loss"] == pytest.approx(sum(part["loss"] for part in parts) / 2, rel=1e-5)
    assert objective.accumulate(5, [20, 21, 22, 23])["loss"] == whole["loss"]
    assert objective.accumulate(6, [20, 21, 22, 23])["loss"] != whole["loss"], "other noise"


def test_only_the_head_has_a_gradient_and_the_vae_is_not_there(tiny_backbone):
    objective = Preference(latent_reward(tiny_backbone), dataset(tiny_backbone), seed=0)
    del tiny_backbone.networks["vae"]
    objective.accumulate(0, [0, 1, 2, 3])
    assert gradients(objective).keys() == objective.parameters().keys()
    assert all(parameter.grad is None for parameter in tiny_backbone.transformer.parameters())


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_own_adapter_is_trained(tiny_backbone, checkpointing):
    adapter = RewardAdapter(rank=2, alpha=4.0, targets=("to_q", "ffn.net.2"))
    objective = Preference(latent_reward(tiny_backbone, adapter=adapter), dataset(tiny_backbone), seed=0)
    tiny_backbone.running.checkpointing = checkpointing
    objective.accumulate(0, [0, 1, 2, 3])
    moved = [name for name, gradient in gradients(objective).items() if gradient.abs().max() > 0]
    assert {name.split(".")[2] for name in moved if name.startswith("adapter.")} == {"0", "1"}, "both of its blocks"
    assert tiny_backbone.active_adapter is None


@pytest.mark.parametrize("loss", ["bce", "rao_kupper"])
def test_the_head_learns_a_planted_preference(tiny_backbone, loss):
    objective = Preference(latent_reward(tiny_backbone), dataset(tiny_backbone, 32), seed=0, loss=loss)
    optimizer = torch.optim.AdamW(objective.parameters().values(), lr=1e-2)
    for step in range(30):
        optimizer.zero_grad()
        objective.accumulate(step, range(16 * step, 16 * step + 16))
        optimizer.step()
    with torch.no_grad():
        held_out = dataset(tiny_backbone, 32)
        clean = held_out.latents.flip(3)  # other videos, the same planted cue
        condition = held_out.condition(held_out.prompts, held_out.video.tolist())
        logits = objective.reward.logits(clean, torch.tensor(0.1), condition)["good"]
    good = held_out.labels["good"] == 1
    assert (logits[good][:, None] > logits[~good][None]).double().mean() > 0.95


def test_missing_labels_of_one_dimension(tiny_backbone):
    """A dimension that has no label in a batch leaves the loss of the others as it is."""
    labels = {"good": torch.tensor([1.0, 0.0, 1.0, 0.0]), "other": torch.full((4,), NAN)}
    labels["other"][2:] = torch.tensor([0.0, 1.0])
    both = Preference(latent_reward(tiny_backbone, ["good", "other"]), dataset(tiny_backbone, 4, labels), seed=0)
    index = next(i for i in range(4) if both.draw(0, [i])[0].rows < [2])
    metrics = both.accumulate(0, [index])
    assert "accuracy/good" in metrics and "accuracy/other" not in metrics
    last = both.parameters()["head.mlp.5.weight"].grad
    assert last[0].abs().max() > 0 and last[1].abs().max() == 0


def test_a_failed_batch_can_be_described(tiny_backbone):
    objective = Preference(latent_reward(tiny_backbone), dataset(tiny_backbone), seed=0)
    tensors, facts = objective.describe(3, [6, 7])
    assert tensors.keys() == {"latents", "sigma", "noise", "target/good"} and len(facts["prompts"]) == 2


# --------------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("loss", ["bce", "rao_kupper"])
def test_pixel_preference(tiny_backbone, loss):
    objective = PixelPreference(pixel_reward(), dataset(tiny_backbone), tiny_backbone, seed=0, loss=loss)
    assert isinstance(objective, Objective)
    whole = objective.accumulate(1, [4, 5, 6, 7])
    expected = gradients(objective)
    assert expected.keys() == objective.parameters().keys()
    clear(objective)
    for part in ([4, 5], [6, 7]):
        objective.accumulate(1, part)
    for name, gradient in gradients(objective).items():
        torch.testing.assert_close(gradient / 2, expected[name], rtol=1e-3, atol=1e-5)
    assert 0 <= whole["accuracy/good"] <= 1
    assert objective.describe(1, [4])[1]["prompts"]


def test_kept_clips_are_decoded_once_and_change_nothing(tiny_backbone):
    calls = []
    decode = tiny_backbone.decode
    tiny_backbone.decode = lambda latents: calls.append(len(latents)) or decode(latents)
    videos = dataset(tiny_backbone, 4)
    losses = {}
    for keep in (False, True):
        calls.clear()
        objective = PixelPreference(pixel_reward(), videos, tiny_backbone, seed=0, frames=2, keep_decoded=keep)
        losses[keep] = [objective.accumulate(0, range(4 * epoch, 4 * epoch + 4))["loss"] for epoch in range(3)]
        assert calls == ([4] if keep else [4, 4, 4])
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_frame_subsets_carry_their_times(tiny_backbone):
    reward = pixel_reward()
    seen = []
    logits = reward.logits
    reward.logits = lambda pixels, condition, times: seen.append((pixels, times)) or logits(pixels, condition, times)
    objective = PixelPreference(reward, dataset(tiny_backbone), tiny_backbone, seed=0, frames=3)
    for step in range(6):
        objective.accumulate(step, [0, 1])
    assert all(pixels.shape[2] == 3 and torch.equal(times, times.sort().values) for pixels, times in seen)
    assert len({tuple(times.tolist()) for _, times in seen}) > 1, "another subset each step"
    batch = objective.describe(0, [0, 1])[0]["latents"]
    whole = tiny_backbone.decode(batch)
    shown = (seen[0][1] * 4).round().long()
    torch.testing.assert_close(seen[0][0], whole[:, :, shown], rtol=2e-3, atol=2e-3)
