"""Which steps the methods draw: every one that they may, and no other."""

from __future__ import annotations

from prfl.objective.methods.alignprop import AlignProp
from prfl.objective.methods.base import Method
from prfl.objective.methods.dense_process import DenseProcess
from prfl.objective.methods.drtune import DrTune
from prfl.objective.methods.leapalign import LeapAlign
from prfl.objective.methods.prfl import Prfl
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.plan import Clean
from prfl.rollout.solvers import euler

CHAIN = euler(chain_sigmas(5, 3.0))


def trained(method: Method, step: int) -> frozenset[int]:
    return method.plan(step).plan.trains


def test_alignprop_draws_every_number_of_last_steps() -> None:
    counts = {len(trained(AlignProp(CHAIN, 0), step)) for step in range(60)}
    assert counts == {1, 2, 3, 4}, "never the whole chain"
    assert {len(trained(AlignProp(CHAIN, 0, (2, 5)), step)) for step in range(60)} == {2, 3, 4, 5}


def test_drtune_spreads_its_steps() -> None:
    ten = euler(chain_sigmas(10, 3.0))
    even = {tuple(sorted(trained(DrTune(ten, 0, 3), step))) for step in range(60)}
    assert even == {(first, first + 3, first + 6) for first in range(4)}
    anywhere = {tuple(sorted(trained(DrTune(ten, 0, 3, "random"), step))) for step in range(60)}
    assert len(anywhere) > 30 and {k for steps in anywhere for k in steps} == set(range(10))
    assert trained(DrTune(ten, 0, 10), 0) == set(range(10))
    early = [DrTune(ten, 0, 3, early_stop=0.4).plan(step) for step in range(60)]
    assert {step_plan.node for step_plan in early} == {Clean(m) for m in (6, 7, 8, 9)}
    assert all(max(step_plan.plan.trains) <= step_plan.node.source for step_plan in early)


def test_leapalign_draws_any_two_steps() -> None:
    pairs = {tuple(sorted(trained(LeapAlign(CHAIN, 0), step))) for step in range(100)}
    assert len(pairs) == 10


def test_dense_process_draws_one_step_of_each_part() -> None:
    drawn = [DenseProcess(CHAIN, 0, rewards=2).drawn(step) for step in range(60)]
    assert {a for a, _ in drawn} == {0, 1} and {b for _, b in drawn} == {2, 3, 4}
    assert DenseProcess(CHAIN, 0, rewards=5).drawn(3) == [0, 1, 2, 3, 4]
    late = DenseProcess(CHAIN, 0, rewards=1, steps_range=(0.8, 1.0))
    assert late.drawn(0) == [4] and not late.noisy and DenseProcess(CHAIN, 0).noisy


def test_a_share_of_the_chains_starts_from_data_at_the_drawn_step() -> None:
    method = Prfl(CHAIN, 0, from_data=0.3)
    plans = [method.plan(step) for step in range(400)]
    data = [step_plan for step_plan in plans if step_plan.first]
    assert 0.22 < len(data) / 400 < 0.38
    assert all(step_plan.plan.trains == {step_plan.first} for step_plan in data)
    assert {step_plan.first for step_plan in data} == {1, 2, 3, 4}, "at the first node nothing is left of a clip"
    plain = [Prfl(CHAIN, 0).plan(step) for step in range(400)]
    assert all(one == other for one, other in zip(plans, plain, strict=True) if not one.first), "the others are as ever"
    dense = [DenseProcess(CHAIN, 0, rewards=4, from_data=1.0).plan(step) for step in range(5)]
    assert all(step_plan.first == 1 and step_plan.plan.trains == {1, 2, 3, 4} for step_plan in dense)
