"""Flow matching on cached latents: loss, draws, prompt dropout, adapter and full parameters."""

from __future__ import annotations

import pytest
import torch

from prfl.backbone import Ask
from prfl.backbone.condition import with_unconditional
from prfl.data.dataset import LatentDataset
from prfl.objective.sft import Sft
from prfl.utils.order import shuffled
from tests.objective.parts import PROMPTS, SHAPE, assert_same_gradients, take_gradients, with_policy


def dataset(backbone, count=5, asks=PROMPTS) -> LatentDataset:
    prompts = [PROMPTS[i % 3] for i in range(count)]
    frames = [(asks[i % 3].image, asks[i % 3].clip) for i in range(count)] if isinstance(asks[0], Ask) else ()
    return LatentDataset(
        latents=torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0)),
        conditions={ask: backbone.condition([ask]) for ask in with_unconditional(asks)}, first_frames=frames,
        prompts=prompts, device=backbone.facts.device, skipped=[], video=torch.arange(count), labels={},
    )  # fmt: skip


def test_loss_and_gradient_are_flow_matching(tiny_backbone):
    objective = Sft(
        with_policy(tiny_backbone), dataset(tiny_backbone), seed=0, prompt_dropout=0.0, shift=3.0, scale=2.0
    )
    batch = objective.draw(3, [6, 7])
    sigma = batch.sigma[:, None, None, None, None]
    condition = tiny_backbone.condition(batch.prompts)
    with tiny_backbone.adapter("policy"):
        velocity = tiny_backbone.velocity((1 - sigma) * batch.clean + sigma * batch.noise, batch.sigma, condition)
        loss = (velocity - (batch.noise - batch.clean)).pow(2).mean()
        (2.0 * loss).backward()
    expected = take_gradients(objective)
    assert objective.accumulate(3, [6, 7])["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_same_gradients(take_gradients(objective), expected)
    assert tiny_backbone.active_adapter is None


def test_halves_are_the_whole(tiny_backbone):
    objective = Sft(with_policy(tiny_backbone), dataset(tiny_backbone), seed=0, prompt_dropout=0.5)
    objective.accumulate(1, [4, 5, 6, 7])
    whole = take_gradients(objective)
    for half in ([4, 5], [6, 7]):
        objective.accumulate(1, half)
    assert_same_gradients({name: g / 2 for name, g in take_gradients(objective).items()}, whole)


def test_all_parameters(tiny_backbone):
    objective = Sft(tiny_backbone, dataset(tiny_backbone), seed=0, adapter=None)
    assert objective.parameters() == {}
    tiny_backbone.transformer.requires_grad_(True)
    assert len(objective.parameters()) == len(list(tiny_backbone.transformer.parameters()))
    objective.accumulate(0, [0, 1])
    without = [name for name, p in objective.parameters().items() if p.grad is None]
    assert not without


def test_prompts_are_dropped_in_their_share(tiny_backbone):
    with_policy(tiny_backbone)
    data = dataset(tiny_backbone)
    batch = Sft(tiny_backbone, data, seed=0, prompt_dropout=0.3).draw(0, list(range(200)))
    assert 0.2 < sum(batch.dropped) / 200 < 0.4
    dropped, kept = batch.dropped.index(True), batch.dropped.index(False)
    assert int(batch.condition.tensors["lengths"][dropped]) == int(data.conditions[""].tensors["lengths"][0])
    own = data.conditions[batch.prompts[kept]]
    length = int(own.tensors["lengths"][0])
    assert torch.equal(
        batch.condition.tensors["prompt_embeds"][kept, :length], own.tensors["prompt_embeds"][0, :length]
    )
    assert not any(Sft(tiny_backbone, data, seed=0, prompt_dropout=0.0).draw(0, list(range(50))).dropped)
    assert all(Sft(tiny_backbone, data, seed=0, prompt_dropout=1.0).draw(0, list(range(50))).dropped)


def test_sigmas_follow_the_shift(tiny_backbone):
    with_policy(tiny_backbone)
    data = dataset(tiny_backbone)
    even, shifted = (Sft(tiny_backbone, data, seed=0, shift=s).draw(0, list(range(300))).sigma for s in (1.0, 5.0))
    assert float(even.mean()) == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(shifted, 5 * even / (1 + 4 * even))


def test_every_clip_once_per_epoch():
    seen = shuffled(range(20), 5, 0, "sft")
    assert all(sorted(seen[e : e + 5]) == [0, 1, 2, 3, 4] for e in range(0, 20, 5))
    assert seen[:5] != seen[5:10] or seen[5:10] != seen[10:15]
    assert shuffled([7, 12], 5, 0, "sft") == [seen[7], seen[12]]
