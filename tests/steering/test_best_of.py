"""The engine by its plainest method: chains are the plain ones bit for bit, and what was counted is what was called."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prfl.rollout.sampling import start_noise
from prfl.rollout.trajectory import rollout
from prfl.steering.best_of import BestOf
from prfl.steering.budget import calls_of, within
from prfl.steering.calls import Prices
from prfl.steering.process import Look
from prfl.utils import rng
from prfl.utils.errors import PrflError
from tests.steering import toy

SOLVERS = {"euler": {}, "unipc": {}, "ancestral": {"eta": 1.0}, "flow_sde": {"eta": 0.7}}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("decide_at", [(1.0,), (0.3, 0.6)])
def test_chosen_chains_are_the_plain_ones_bit_for_bit(solver: str, decide_at: tuple[float, ...]):
    chain = toy.schedule(solver, **SOLVERS[solver])
    process = toy.process(chain, groups=2)
    kept = BestOf(chains=4, keep=2, decide_at=decide_at)(process).kept
    assert kept.groups == (0, 0, 1, 1)
    for row, (group, origin) in enumerate(zip(kept.groups, kept.origins, strict=True)):
        prompt = f"prompt {group}"
        start = start_noise((1,), 0, [prompt], [group * 4 + origin]).double()
        noises = [rng.normal((1,), 0, f"steer/{prompt}/{group}", i, [origin]).double() for i in range(chain.steps)]
        plain = rollout(toy.velocity, start, chain, noises=noises, keep=set())
        assert torch.equal(plain.at(chain.steps)[0], kept.latents[row])


def test_the_best_by_score_go_on_and_the_others_are_rejected_where_they_were():
    process = toy.process(toy.schedule(steps=10), looks=[Look(lambda x, sigma, condition: -x.flatten(1).sum(1))])
    steered = BestOf(chains=6, keep=2, decide_at=(0.5,))(process)
    plain = toy.process(toy.schedule(steps=10))
    all_chains = plain.step_to(plain.start(6), 5)
    ranked = sorted(range(6), key=lambda row: float(all_chains.latents[row]))
    assert list(steered.kept.origins) == ranked[:2]
    assert sorted(rejected.origin for rejected in steered.rejected) == sorted(ranked[2:])
    for rejected in steered.rejected:
        assert rejected.node == 5
        clean = plain.step_to(all_chains.select([rejected.origin]), 5).clean
        assert clean is not None
        torch.testing.assert_close(rejected.clean, clean[0].float())
        assert rejected.trace == ((5, -float(all_chains.latents[rejected.origin])),)


@pytest.mark.parametrize(
    ("method", "policy", "reward"),
    [
        (BestOf(8, 1, (0.5,)), 8 * 10 + 10, 8 * 0.5),
        (BestOf(8, 1, (1.0,)), 8 * 20, 8 * 0.5),
        (BestOf(8, 2, (0.5, 0.75)), 8 * 10 + 4 * 5 + 2 * 5, 12 * 0.5),
        (BestOf(1, 1, (0.5,)), 20, 0.5),
    ],
)
def test_calls_are_those_that_were_made_and_foretold(method: BestOf, policy: float, reward: float):
    chain, made = toy.schedule(), {"policy": 0, "reward": 0}
    process = toy.process(chain, groups=3, batch=5)

    def counted(x, sigma, condition, network=process.network):
        made["policy"] += len(x)
        return network(x, sigma, condition)

    def read(x, sigma, condition):
        made["reward"] += len(x)
        return toy.value(x, sigma)

    process = replace(process, network=counted, looks=[Look(read, calls=0.5)])
    steered = method(process)
    assert (steered.calls / 3).policy == policy == made["policy"] / 3
    assert (steered.calls / 3).reward == reward == made["reward"] / 3 * 0.5
    assert calls_of(method, chain, process.looks, process.prices) == steered.calls / 3


def test_a_pixel_look_pays_its_decodes_and_reads_the_clean_prediction_for_nothing_more():
    looks = [Look(lambda x, sigma, condition: x.flatten(1).sum(1), clean=True, decodes=1)]
    for solver, extra in (("euler", 0), ("ancestral", 8)):  # behind a noisy step the prediction is a call
        chain = toy.schedule(solver, **SOLVERS[solver])
        process = toy.process(chain, looks=looks)
        steered = BestOf(8, 1, (0.5,))(process)
        saved = 1 if extra else 0  # the survivor's next step has its call already
        assert steered.calls.policy == 90 + extra - saved
        assert steered.calls.decodes == 8 * 2.0
        plain = toy.process(chain)
        chains = plain.step_to(plain.start(8), 10)
        clean = chains.latents - chain.sigmas[10] * toy.velocity(chains.latents, chain.sigmas[10])
        if extra:
            assert steered.kept.scores[0] == pytest.approx(float(clean.max()))


def test_several_looks_add_up_by_their_weights():
    looks = [Look(lambda x, s, c: x.flatten(1).sum(1), weight=2.0), Look(lambda x, s, c: s.expand(len(x)), weight=-1.0)]
    process = toy.process(toy.schedule(steps=4), looks=looks)
    chains = process.look(process.step(process.start(3)))
    torch.testing.assert_close(torch.tensor(chains.scores), 2 * chains.latents[:, 0].float() - 0.75)


def test_a_budget_is_spent_as_far_as_it_goes():
    chain, looks, prices = toy.schedule(), [Look(toy.value, calls=0.5)], Prices()
    method = within(90.0, BestOf(1, 1, (0.5,)), chain, looks, prices)
    assert method.chains == 7  # 7 * 10.5 + 10 = 83.5; 8 take 94
    with pytest.raises(PrflError, match=r"steering.budget.* 20.5"):
        within(20.0, BestOf(1, 1, (0.5,)), chain, looks, prices)


def test_choosing_raises_the_reward_and_more_so_with_more_chains():
    means = []
    for chains in (1, 4, 16):
        process = toy.process(toy.schedule(), groups=200)
        means.append(float(BestOf(chains, 1, (0.8,))(process).kept.latents.mean()))
    assert means[0] == pytest.approx(toy.MEAN, abs=0.2) and means[0] + 0.5 < means[1] and means[1] + 0.3 < means[2]


@pytest.mark.parametrize("batch", [4096, 3])
def test_finished_chains_are_read_again_at_noise_levels_by_the_same_noise(batch: int):
    look = Look(toy.value, calls=0.5, levels=(0.3, 0.6))
    process = toy.process(toy.schedule(steps=10), groups=2, looks=[look], batch=batch)
    steered = BestOf(chains=4, keep=4, decide_at=(1.0,))(process)
    for group, latents, trace in zip(steered.kept.groups, steered.kept.latents, steered.kept.traces, strict=True):
        scores = []
        for number, level in enumerate(look.levels):
            noise = rng.normal((1,), 0, f"again/prompt {group}/{group}", number, [0])[0].double()
            sigma = torch.tensor(level, dtype=torch.float64)
            scores.append(toy.value(((1 - sigma) * latents + sigma * noise)[None], sigma))
        assert trace == ((10, pytest.approx(float(torch.stack(scores).mean()), rel=1e-12)),)
    assert steered.calls.reward == 2 * 4 * 2 * 0.5
    counted = calls_of(BestOf(4, 4, (1.0,)), process.schedule, [look], Prices())
    assert counted.reward * 2 == steered.calls.reward and counted.policy * 2 == steered.calls.policy
