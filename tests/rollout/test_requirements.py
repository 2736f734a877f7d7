"""What a rollout must visit and keep, of plans whose answer is plain to see."""

from __future__ import annotations

import pytest

from prfl.objective.methods.draft_lv import DraftLv
from prfl.objective.methods.leapalign import LeapAlign
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.plan import Clean, Renoised, StepPlan, chain_plan, clean_jump, one_step
from prfl.rollout.requirements import requirements
from prfl.rollout.solvers import euler, unipc

STEPS = 6
CHAIN = euler(chain_sigmas(STEPS, 3.0))
PRFL = StepPlan(one_step(CHAIN, 3), {4: 1.0})
REFL = StepPlan(clean_jump(CHAIN, 3), {Clean(3): 1.0})


def test_one_step_is_rolled_out_to_where_it_is_scored() -> None:
    needs = requirements([PRFL], CHAIN)
    assert (needs.path, needs.latents, needs.outputs, len(needs.calls)) == ([0, 1, 2, 3, 4], {3, 4}, set(), 4)
    assert needs.exact == {3} and len(needs.cheaper_calls) == 3


@pytest.mark.parametrize("step_plan", [PRFL, REFL])
def test_a_retained_graph_is_made_after_the_rollout(step_plan: StepPlan) -> None:
    needs = requirements([step_plan], CHAIN, retain_graph=True)
    assert (needs.path, needs.latents, needs.outputs, len(needs.calls)) == ([0, 1, 2, 3], {3}, set(), 3)


def test_a_clean_prediction_costs_the_call_that_the_rollout_does_not_make() -> None:
    needs = requirements([REFL], CHAIN)
    assert (needs.path, needs.latents, needs.outputs, len(needs.calls)) == ([0, 1, 2, 3], {3, Clean(3)}, {3}, 4)


def test_a_multistep_solver_keeps_the_earlier_outputs_of_a_retained_step() -> None:
    chain = unipc(chain_sigmas(STEPS, 3.0))
    needs = requirements([StepPlan(one_step(chain, 3), {4: 1.0})], chain, retain_graph=True)
    assert needs.path == [0, 1, 2, 3] and needs.outputs == chain.b[3].keys() - {3} != set()


def test_what_is_noised_anew_needs_the_chains_end() -> None:
    needs = requirements([DraftLv(CHAIN, 0, 1).plan(0)], CHAIN)
    copy = Renoised(0, STEPS - 1)
    assert needs.latents == {STEPS - 1, STEPS, copy, Clean(copy)} and len(needs.calls) == STEPS + 1


def test_leaps_that_are_weighed_are_compared_with_the_chain() -> None:
    k, j = sorted(LeapAlign(CHAIN, 0).plan(0).plan.trains)
    needs = requirements([LeapAlign(CHAIN, 0).plan(0)], CHAIN)
    assert (needs.latents, needs.outputs) == ({k, j, STEPS}, {k, j})
    assert needs.exact == {k, j, STEPS - 1}, "the step that leads to what is scored, too"


def test_a_coarse_rollout_hits_both_ends_of_trained_steps() -> None:
    sparse = StepPlan(chain_plan(CHAIN, {1, 3}, beta=0.0), {STEPS: 1.0})
    assert requirements([sparse], CHAIN, stride=20).path == [0, 1, 2, 3, 4, 6]
    assert requirements([PRFL], CHAIN, stride=2).path == [0, 1, 3, 4]


def test_a_rollout_for_several_steps_is_scored_where_their_edges_end() -> None:
    needs = requirements([PRFL, StepPlan(one_step(CHAIN, 1), {2: 1.0})], CHAIN, reused=True)
    assert (needs.path, needs.latents, needs.outputs, len(needs.calls)) == ([0, 1, 2, 3, 4], {1, 3}, {1, 3}, 4)
    assert needs.exact == {1, 3}
