"""Several latent rewards as one, against plain autograd through all of them at once."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from prfl.backbone import LoraSpec
from prfl.backbone.checkpointing import Running
from prfl.backbone.wan.text import text_condition
from prfl.objective.loss import RewardLoss, loss_gradient
from prfl.reward import LatentReward, Normalisation, RewardAdapter, RewardEnsemble, RewardHead
from prfl.reward.scorer import LatentScorer
from prfl.utils.errors import PrflError
from tests.objective.parts import stir
from tests.toy_facts import NoText, toy_facts

NAMES = ["motion", "look", "light"]
SIGMA = torch.tensor([0.2, 0.5, 0.9])
CONDITION = text_condition(torch.zeros(3, 1, 4), torch.ones(3, dtype=torch.long))


class Toy:
    """A float64 stand-in for a backbone of three blocks; what an adapter adds is another matrix per block."""

    def __init__(self, adapters: tuple[str, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (3, 6, 6)
        make = lambda: 0.5 * torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
        self.weights = {name: make() for name in (None, *adapters)}
        self.facts, self.running, self.text = replace(toy_facts(), latent_channels=6), Running(), NoText()
        self.networks: dict[str, torch.nn.Module] = {}
        self.active: str | None = None
        self.calls: list[tuple[str | None, bool, int]] = []

    def unasked(self, *_: object) -> None:
        raise AssertionError("the ensemble asks for features alone")

    latent_shape = sigmas = condition = start = velocity = encode = decode = unasked

    def add_adapter(self, name: str, spec: LoraSpec) -> None:
        assert name in self.weights

    def parameters(self, name: str | None) -> dict:
        return {}

    def adapter(self, name: str | None, dropout: torch.Tensor | None = None):
        toy = self

        class Selected(nullcontext):
            def __enter__(self) -> None:
                self.before, toy.active = toy.active, name

            def __exit__(self, *_: object) -> None:
                toy.active = self.before

        return Selected()

    def features(self, latents, sigma, condition, blocks):
        self.calls.append((self.active, torch.is_grad_enabled(), max(blocks)))
        hidden, kept = latents.flatten(2).transpose(1, 2), []
        for block in range(max(blocks) + 1):
            weight = self.weights[None][block] + (self.weights[self.active][block] if self.active else 0)
            hidden = torch.tanh(hidden @ weight + sigma[:, None, None].double()) + hidden
            kept.append(hidden)
        return [kept[block] for block in blocks]


def member(toy: Toy, seed: int, blocks: list[int], names: list[str] = NAMES, adapter: str | None = None):
    torch.manual_seed(seed)
    head = RewardHead(6, names, blocks=len(blocks), inner=8, heads=2, hidden=8, film=True).double()
    own = None if adapter is None else RewardAdapter(1, 1.0, ("x",), name=adapter)
    normal = Normalisation({n: 0.1 * i for i, n in enumerate(names)}, {n: 0.5 + 0.1 * seed for n in names})
    return LatentReward(head, toy, blocks, adapter=own, normalisation=normal)  # type: ignore[arg-type]


def latents(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 6, 2, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def naive(members, weight, aggregate, loss, x, sigma):
    """The loss with one graph through all members, each under its own adapter: no second pass, no grouping."""
    scores = []
    for reward in members:
        with reward.selected():
            logits = reward.head(reward.backbone.features(x, sigma, None, list(reward.blocks)), sigma)
        own = {name: logits[:, reward.dimensions.index(name)] for name in NAMES}
        if aggregate == "sum":
            own = {n: (v - reward.normalisation.mean[n]) / reward.normalisation.std[n] for n, v in own.items()}
        scores.append(torch.stack([own[name] for name in NAMES]))
    stacked = torch.stack(scores)
    mean = stacked.mean(0)
    deviation = ((stacked - mean).square().mean(0)).sqrt()
    combined = mean - weight * deviation
    return loss(dict(zip(NAMES, combined, strict=True)))[0].mean(), deviation.mean()


@pytest.mark.parametrize("adapters", [(), ("one", "two")], ids=["frozen", "adapters"])
@pytest.mark.parametrize("aggregate", ["sum", "logsigmoid"])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_gradient_is_that_of_one_graph_through_all_members(adapters, aggregate, weight) -> None:
    toy = Toy(adapters)
    members = [member(toy, 1, [0, 2]), member(toy, 2, [1], names=NAMES[::-1])]
    members += [member(toy, 3 + i, [i + 1], adapter=name) for i, name in enumerate(adapters)]
    loss = RewardLoss({"motion": 1.0, "look": -0.5, "light": 2.0}, aggregate=aggregate, shape="linear", scale=3.0)
    ensemble = RewardEnsemble(members, weight)
    x = latents()
    toy.calls.clear()
    found, metrics = loss_gradient(LatentScorer(ensemble, aggregate), loss, x, torch.tensor(0.4), CONDITION, 0)  # type: ignore
    graphs = [name for name, graph, _ in toy.calls if graph]
    assert sorted(map(str, graphs)) == sorted(map(str, [None, *adapters])), "a graph for each adapter, one for the rest"
    assert len(toy.calls) == (1 if not adapters else 2 * (1 + len(adapters)))
    leaf = x.clone().requires_grad_()
    expected, deviation = naive(members, weight, aggregate, loss, leaf, torch.full((3,), 0.4))
    expected.backward()
    assert leaf.grad is not None and float(leaf.grad.abs().max()) > 1e-3
    torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-12)
    assert metrics["loss"] == pytest.approx(float(expected.detach())) and toy.active is None
    assert (
        metrics["reward/uncertainty"] == pytest.approx(float(deviation.detach())) and float(deviation.detach()) > 1e-2
    )


def test_members_that_agree_are_one_reward() -> None:
    """The deviation has no derivative where it is zero; its gradient there is taken as zero, never as nan."""
    toy = Toy()
    same = [member(toy, 1, [1]), member(toy, 1, [1])]
    loss = RewardLoss(dict.fromkeys(NAMES, 1.0), shape="linear")
    read = [LatentScorer(reward) for reward in (RewardEnsemble(same, 5.0), same[0])]
    (both, metrics), (one, _) = (loss_gradient(r, loss, latents(), torch.tensor(0.4), CONDITION, 0) for r in read)  # type: ignore
    torch.testing.assert_close(both, one, rtol=1e-12, atol=1e-14)
    assert metrics["reward/uncertainty"] == 0


def test_members_with_adapters_on_a_checkpointed_backbone(tiny_backbone) -> None:
    """On real blocks, which are computed again in the backward pass: each under the adapter of its own member."""
    tiny_backbone.add_adapter("policy", LoraSpec(rank=2, alpha=2.0, targets=["to_q"]))
    members = []
    for number in range(2):
        torch.manual_seed(number)
        head = RewardHead(tiny_backbone.facts.widths[0], NAMES, inner=16, heads=2, hidden=16)
        own = RewardAdapter(2, 4.0, ("to_q", "ffn.net.2"), name=f"reward-{number}")
        members.append(LatentReward(head, tiny_backbone, [1], adapter=own))
        stir(tiny_backbone, own.name, seed=number)
    x = torch.randn(3, *tiny_backbone.latent_shape(5, 16, 16), generator=torch.Generator().manual_seed(0))
    condition = tiny_backbone.condition(["a red circle", "a blue square", "a green triangle"])
    loss = RewardLoss(dict.fromkeys(NAMES, 1.0), shape="linear", scale=3.0)
    leaf = x.clone().requires_grad_()
    ensemble = RewardEnsemble(members, 0.7)
    scores = [{n: reward(leaf, SIGMA, condition)[n] for n in NAMES} for reward in members]
    expected = torch.autograd.grad(loss(ensemble.combine(scores))[0].mean(), leaf)[0]
    for checkpointing, offload in (("none", False), ("full", False), ("attention", False), ("full", True)):
        tiny_backbone.running.checkpointing, tiny_backbone.running.offload = checkpointing, offload
        again = x.clone().requires_grad_()
        with ensemble.selected():
            value = loss(ensemble(again, SIGMA, condition))[0].mean()
        found = torch.autograd.grad(value, again)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert tiny_backbone.active_adapter is None


def test_members_of_other_dimensions_are_refused() -> None:
    toy = Toy()
    with pytest.raises(PrflError, match=r"^reward\.path: .*number 2 motion, sound"):
        RewardEnsemble([member(toy, 1, [1]), member(toy, 2, [1], names=["motion", "sound"])])
    named = ["uncertainty"]
    with pytest.raises(PrflError, match="cannot be called 'uncertainty'"):
        RewardEnsemble([member(toy, 1, [1], names=named), member(toy, 2, [1], names=named)])
