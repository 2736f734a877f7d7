"""Every method on a Gaussian whose tilt is known, and what all of them have in common."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prfl.steering.best_of import BestOf
from prfl.steering.budget import calls_of, within
from prfl.steering.choosing import effective_size, one_of, systematic
from prfl.steering.dlbs import BeamSearch
from prfl.steering.doit import Doit
from prfl.steering.dts import Tree, TreeSearch
from prfl.steering.fk import FkSteering
from prfl.steering.guidance import GuidedSampling, shortened
from prfl.steering.latsearch import LatSearch
from prfl.steering.noise import NoiseSearch, start_slope
from prfl.steering.process import Look, Process
from prfl.steering.svdd import Svdd
from prfl.utils import rng
from tests.steering import toy

METHODS = {
    "best_of": BestOf(4, 1, (0.5,)),
    "svdd": Svdd(4),
    "fk": FkSteering(4),
    "dlbs": BeamSearch(2, children=2),
    "dlbs, ahead": BeamSearch(2, children=3, lookahead=3, every=5),
    "guidance": GuidedSampling(2),
    "doit": Doit(3),
    "noise": NoiseSearch(3, rounds=2),
    "noise, gradient": NoiseSearch(3, rounds=2, gradient=True),
    "dts": TreeSearch(4),
    "latsearch": LatSearch(4),
}
UP_TO = ("dts", "latsearch")  # what they cost depends on the scores: the most that it may be is foretold


class QuickProcess(Process):
    """Draws all chains' noise at once, for statistics over thousands of them."""

    def noise(self, chains) -> Tensor:
        drawn = torch.Generator().manual_seed(
            rng.hashed(self.seed, f"{chains.slots[0]}/{chains.groups[0]}", chains.node)
        )
        return torch.randn(len(chains), *self.state, generator=drawn)


def quick(chain, groups: int, looks=None) -> Process:
    slow = toy.process(chain, groups, looks)
    return QuickProcess(**vars(slow))


def tilted(values: Tensor, weights: Tensor | None = None) -> None:
    """Assert mean and variance of the tilted Gaussian, to four standard errors and a coarse chain's bias."""
    count = len(values) / 4  # resampled chains are not independent
    weights = torch.ones(len(values)) if weights is None else weights
    weights = weights / weights.sum()
    mean = float((weights * values).sum())
    variance = float((weights * (values - mean) ** 2).sum())
    assert mean == pytest.approx(toy.TILTED, abs=4 * (toy.VARIANCE / count) ** 0.5 + 0.05)
    assert variance == pytest.approx(toy.VARIANCE, rel=4 * (2 / count) ** 0.5 + 0.1)


# --- draws ------------------------------------------------------------------------------------------


def test_systematic_resampling_is_unbiased_and_even():
    weights = torch.tensor([0.05, 0.5, 0.15, 0.3, 0.0], dtype=torch.float64)
    counts = torch.zeros(5, dtype=torch.float64)
    for number in range(1000):
        rows = systematic(weights.log(), number / 1000)
        each = torch.bincount(rows, minlength=5)
        assert ((each - 5 * weights).abs() < 1 + 1e-6).all(), "no count is a whole one away from its mean"
        counts += each
    torch.testing.assert_close(counts / 5000, weights, rtol=0, atol=2e-3)


@pytest.mark.parametrize("offset", [0.0, 1e-12, 0.5, 1 - 1e-12])
@pytest.mark.parametrize("count", [1, 3, 7, 64])
def test_equal_weights_change_nothing(count: int, offset: float):
    assert systematic(torch.full((count,), -3.7), offset).tolist() == list(range(count))
    assert effective_size(torch.full((count,), -3.7)) == pytest.approx(count)


def test_one_is_drawn_in_proportion():
    weights = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    drawn = torch.bincount(torch.tensor([one_of(weights.log(), (k + 0.5) / 1000) for k in range(1000)]))
    assert drawn.tolist() == [200, 700, 100]
    assert effective_size(weights.log()) == pytest.approx(1 / 0.54)


# --- what is common -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("solver", [("euler", {}), ("unipc", {}), ("ancestral", {"eta": 1.0})], ids=lambda s: s[0])
def test_calls_are_foretold_by_every_method_and_solver(name: str, solver: tuple):
    method, chain = METHODS[name], toy.schedule(solver[0], 10, **solver[1])
    pixel = Look(lambda x, sigma, condition: x.flatten(1).sum(1), clean=True, decodes=1)
    for looks in ([Look(toy.value, calls=0.5)], [pixel]):
        process = toy.process(chain, groups=2, looks=looks)
        made = [0]  # a backward pass counts as two calls

        def counted(x, sigma, condition, network=process.network, made=made):
            made[0] += len(x) * (3 if x.requires_grad else 1)
            return network(x, sigma, condition)

        process = replace(process, network=counted)
        steered = method(process)
        foretold = calls_of(method, chain, looks, process.prices).total
        spent = steered.calls.total / 2
        assert spent <= foretold + 1e-9 and (name in UP_TO or spent == pytest.approx(foretold))
        assert steered.calls.policy == made[0]
        assert steered.kept.node == 10 and len(steered.kept) == 2 * method.keep


@pytest.mark.parametrize("name", METHODS)
def test_equal_budgets_are_equal(name: str):
    """Within a chain's cost of each other, and never above."""
    chain, looks, prices = toy.schedule("ancestral", 10, eta=1.0), [Look(toy.value, calls=0.5)], toy.PRICES
    method = within(100.0, METHODS[name], chain, looks, prices)
    spent = calls_of(method, chain, looks, prices).total
    more = calls_of(replace(method, chains=method.chains + 1), chain, looks, prices).total
    assert spent <= 100 < more


@pytest.mark.parametrize("solver", [("ancestral", {"eta": 1.0}), ("flow_sde", {"eta": 0.7})], ids=lambda s: s[0])
@pytest.mark.parametrize("method", [Svdd(4, keep=3, strength=0.0), FkSteering(3, 3, 0.0), GuidedSampling(3, 3, 0.0)])
def test_at_strength_0_chains_are_the_plain_ones_bit_for_bit(method, solver: tuple):
    chain = toy.schedule(solver[0], 12, **solver[1])
    process = toy.process(chain, groups=2)
    plain = process.step_to(process.start(3), 12)
    kept = method(toy.process(chain, groups=2)).kept
    for row, (group, origin) in enumerate(zip(kept.groups, kept.origins, strict=True)):
        (same,) = [r for r in plain.rows_of(group) if plain.origins[r] == origin]
        assert torch.equal(kept.latents[row], plain.latents[same])
    assert len(set(zip(kept.groups, kept.origins, strict=True))) == 6


# --- each against its known answer ----------------------------------------------------------------------------------


def test_svdd_draws_the_tilted_distribution_and_greedy_search_runs_past_it():
    chain = toy.schedule("ancestral", 40, eta=1.0)  # whose end does not depend on its start
    drawn = Svdd(32, strength=toy.STRENGTH)(quick(chain, 300)).kept.latents[:, 0]
    tilted(drawn)
    greedy = Svdd(8, greedy=True)(quick(chain, 60)).kept.latents
    assert float(greedy.mean()) > toy.TILTED + 1.5


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_fk_draws_the_tilted_distribution(potential: str):
    method = FkSteering(256, strength=toy.STRENGTH, potential=potential, every=10)
    process = quick(toy.schedule("flow_sde", 40, eta=0.9), 12, [Look(toy.damped_value)])
    chains, weights = method.weighted(process)
    ends = torch.tensor(weights).reshape(12, 256).softmax(1).flatten() / 12
    tilted(chains.latents[:, 0], ends)
    sizes = process.log["effective size"]
    assert len(sizes) == 4 and all(1 < size < 256 for size in sizes)


def test_a_look_ahead_reads_where_a_beam_leads():
    chain = toy.schedule("ancestral", 10, eta=1.0)
    process = toy.process(chain, looks=[Look(lambda x, sigma, condition: 100 * sigma + x.flatten(1).sum(1))])
    chains = process.step_to(process.start(3), 4)
    judged = BeamSearch(lookahead=3).judged(process, chains)
    ahead = chains.latents
    for i in (4, 5, 6):
        ahead = ahead + (chain.sigmas[i + 1] - chain.sigmas[i]) * toy.velocity(ahead, chain.sigmas[i])
    expected = 100 * float(chain.sigmas[7]) + ahead[:, 0]
    torch.testing.assert_close(torch.tensor(judged.scores, dtype=toy.F64), expected)
    assert torch.equal(judged.latents, chains.latents) and process.calls.policy == 3 * 4 + 3 * 3
    process.step(judged)
    assert process.calls.policy == 3 * 4 + 3 * 3, "the first step ahead has called for the next one"


def test_beams_raise_the_reward():
    means = []
    for children in (1, 4):
        process = quick(toy.schedule("ancestral", 20, eta=1.0), 200)
        means.append(float(BeamSearch(1, children=children, every=4)(process).kept.latents.mean()))
    assert means[0] == pytest.approx(toy.MEAN, abs=0.3) and means[1] > means[0] + 0.8


@pytest.mark.parametrize(
    "solver, clean",
    [(("euler", {}), False), (("ancestral", {"eta": 1.0}), True), (("flow_sde", {"eta": 0.7}), False)],
    ids=str,
)
def test_guidance_draws_the_tilted_distribution_with_every_solver(solver: tuple, clean: bool):
    """Also through the clean prediction: of a Gaussian it has the same slope."""
    read = (lambda x, sigma, condition: x.flatten(1).sum(1)) if clean else toy.value
    process = quick(toy.schedule(solver[0], 150, **solver[1]), 1, [Look(read, clean=clean)])
    method = GuidedSampling(4000, 4000, toy.STRENGTH, latest=0.99, longest=1e9)
    tilted(method(process).kept.latents[:, 0])


def test_a_push_is_shortened_sample_by_sample():
    velocity = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    push = torch.tensor([[30.0, 40.0], [0.06, 0.08]])
    torch.testing.assert_close(shortened(push, 0.5, velocity), torch.tensor([[1.5, 2.0], [0.06, 0.08]]))


def test_guidance_acts_between_its_steps_only():
    process = toy.process(toy.schedule(steps=10), looks=[Look(toy.value, calls=1.0)])
    steered = GuidedSampling(1, from_step=0.3, to_step=0.6)(process)
    assert steered.calls.reward == 3 * 3 + 1  # three steps with a forward and a backward pass, and the last look


class ExactRollouts(Doit):
    def ends(self, process, chains) -> tuple[Tensor, Tensor]:
        """Samples of x0 given x, as rollouts without end would give them."""
        mean, variance = toy.posterior(chains.latents, process.schedule.sigmas[chains.node])
        drawn = torch.randn(1, 200_000, 1, generator=torch.Generator().manual_seed(0)).double()
        clean = mean[:, None] + variance.sqrt() * drawn
        return clean, clean[..., 0]


@pytest.mark.parametrize("node", [2, 5, 8])
def test_doit_pushes_as_the_gradient_does_without_it(node: int):
    """v' = v - t / (1 - t) grad log h, with h known: to the error of 200,000 rollouts."""
    process = toy.process(toy.schedule(steps=10))
    chains = process.evaluate(process.step_to(process.start(3), node))
    bent = ExactRollouts(1, strength=toy.STRENGTH, longest=1e9).corrected(process, chains).outputs[node]
    sigma, leaf = process.schedule.sigmas[node], chains.latents.clone().requires_grad_()
    slope = torch.autograd.grad(toy.value(leaf, sigma).sum(), leaf)[0]
    exact = chains.outputs[node] - sigma / (1 - sigma) * toy.STRENGTH * slope
    torch.testing.assert_close(bent, exact, rtol=0, atol=0.02)


def test_doit_raises_the_reward_by_rollouts_alone():
    """A look without a gradient; rollouts of three steps push too little, and at strength 0 there is no push."""
    looks = [Look(lambda x, sigma, condition: x.detach().flatten(1).sum(1))]
    means = []
    for strength in (0.0, toy.STRENGTH):
        process = quick(toy.schedule(steps=10), 1, looks)
        means.append(float(Doit(8, 60, strength, every=1, rollout_steps=3, longest=1e9)(process).kept.latents.mean()))
    assert means[1] > means[0] + 0.2


@pytest.mark.slow
def test_a_tree_draws_by_its_leaves_and_greedily_the_best():
    """A tree of many leaves at once draws as importance weights do; euler's end is Gaussian, so its tilt is known."""
    look = [Look(lambda x, sigma, condition: x.flatten(1).sum(1), calls=0.5)]
    chain = toy.schedule(steps=4)
    drawn = TreeSearch(24, strength=toy.STRENGTH, width=24, every=4)(quick(chain, 30, look))
    ends = torch.tensor([[0.0], [1.0]], dtype=toy.F64)
    for i in range(4):
        ends = ends + (chain.sigmas[i + 1] - chain.sigmas[i]) * toy.velocity(ends, chain.sigmas[i])
    variance = float(ends[1] - ends[0]) ** 2
    assert float(drawn.kept.latents.mean()) == pytest.approx(float(ends[0]) + toy.STRENGTH * variance, abs=0.35)
    assert drawn.calls.policy == 30 * 24 * 4 and drawn.calls.reward == 30 * 24 * 0.5

    tree = TreeSearch(6, strength=toy.STRENGTH, width=3, every=4, greedy=True)
    process = quick(toy.schedule("ancestral", 8, eta=1.0), 10, look)
    best = tree(process).kept
    assert float(best.latents.mean()) > toy.MEAN + 0.5
    for row in range(10):
        assert best.scores[row] == pytest.approx(float(best.latents[row]))


def test_a_trees_values_are_soft_means_of_its_leaves():
    process = toy.process(toy.schedule("ancestral", 6, eta=1.0), looks=[Look(lambda x, s, c: x.flatten(1).sum(1))])
    settings = TreeSearch(4, strength=2.0, width=3, every=3)
    tree = Tree(settings, process, process.start(3), 0)
    tree.grown()

    def soft(node) -> float:
        if not node.children:
            return float(node.chains.latents)
        values = torch.tensor([2 * soft(child) for child in node.children], dtype=toy.F64)
        return float(values.logsumexp(0) - torch.tensor(float(len(values))).log()) / 2

    assert len(tree.leaves) > 4 and tree.spent <= 4 * 6
    assert tree.root.value == pytest.approx(soft(tree.root), abs=1e-6)
    assert len({float(leaf.chains.latents) for leaf in tree.leaves}) == len(tree.leaves), "no two leaves are one"


def test_latsearch_begins_around_one_noise_and_keeps_the_highest_total():
    chain = toy.schedule(steps=10)
    process = toy.process(chain, groups=2, looks=[Look(lambda x, sigma, condition: -x.flatten(1).sum(1))])
    chains = LatSearch(5, spread=0.1).variants(process)
    plain = process.start(5).latents
    assert torch.equal(chains.latents[5], plain[5])
    torch.testing.assert_close(chains.latents[7], 0.99**0.5 * plain[5] + 0.1 * plain[7])
    steered = LatSearch(5, spread=0.9, look_at=(0.4,))(toy.process(chain, 2, process.looks))
    for group in range(2):
        at = process.step_to(LatSearch(5, spread=0.9).variants(process), 4)
        rows = at.rows_of(group)
        lowest = min(rows, key=lambda row: float(at.latents[row]))
        assert steered.kept.origins[group] == at.origins[lowest]


def test_the_noises_mean_moves_towards_the_reward():
    means = []
    for rounds in (1, 4):
        process = replace(quick(toy.schedule(steps=10), 100), state=(16,))
        means.append(float(NoiseSearch(6, rounds=rounds, look_at=0.5)(process).kept.latents.mean()))
    assert means[1] > means[0] + 0.1


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("clean", [False, True])
def test_the_slope_at_the_start_is_that_of_plain_autograd(solver: str, clean: bool):
    """Of a network that is not linear, in float64; samples come in parts, and unipc's steps read earlier outputs."""
    look = Look(lambda x, sigma, condition: (x + sigma).sin().flatten(1).sum(1), clean=clean, weight=0.7)
    process = toy.process(toy.schedule(solver, 6), groups=2, looks=[look], batch=3)
    process = replace(process, state=(5,), network=lambda x, sigma, condition: (x * (1 + sigma)).cos() + x.roll(1, 1))
    chains = process.start(2)
    slope = start_slope(process, chains, 4)

    x, outputs, chain = chains.latents.clone().requires_grad_(), {}, process.schedule
    end = x
    for i in range(4):
        outputs[i] = process.network(end, chain.sigmas[i], process.condition)
        end = chain.a[i] * end + sum(factor * outputs[k] for k, factor in chain.b[i].items())
    sigma = chain.sigmas[4]
    read = end - sigma * process.network(end, sigma, process.condition) if clean else end + sigma
    (expected,) = torch.autograd.grad(0.7 * read.sin().sum(), x)
    assert slope.dtype == toy.F64
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12)


def test_every_start_climbs():
    process = replace(toy.process(toy.schedule(steps=10), groups=8), state=(16,))
    plain = process.step_to(process.start(2), 5)
    method = NoiseSearch(2, rounds=3, rate=0.3, gradient=True)
    climbed = method.climbed(process, 5)
    assert climbed.origins == plain.origins
    scores = torch.tensor(climbed.scores) - torch.tensor(process.look(plain).scores)
    assert float(scores.min()) > 0.2
