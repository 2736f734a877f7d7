"""Rows that are played back from noted chains are the rows that would have been drawn (bench/steering_pool.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.steering_pool import played_back
from prfl.backbone.condition import Condition, as_asks
from prfl.rollout.sampling import jobs
from prfl.steering.best_of import BestOf
from prfl.steering.process import Process
from tests.steering import toy

PROMPTS, CHAINS = ["prompt 0", "prompt 1", "prompt 2"], 12


def begun(indices: list[int], samples: int) -> Process:
    every, _ = jobs(PROMPTS, samples)
    process = toy.process(toy.schedule(steps=8), groups=len(every))
    return replace(process, condition=Condition({}, as_asks(every)), indices=indices)


@pytest.mark.parametrize("method", [BestOf(4, 2, (0.5, 0.75)), BestOf(3, decide_at=(1.0,)), BestOf(1)], ids=str)
def test_a_row_that_is_played_back_is_the_one_that_is_drawn(method: BestOf) -> None:
    samples = CHAINS // method.chains
    drawn = method(begun(jobs(PROMPTS, samples)[1], samples))

    # The same chains, noted once: all of a prompt's as one group.
    process = begun([0] * len(PROMPTS), 1)
    chains, table = process.start(CHAINS), torch.full((len(PROMPTS), CHAINS, 9), torch.nan, dtype=torch.float64)
    for node in (4, 6, 8):
        chains = process.look(process.step_to(chains, node))
        table[..., node] = torch.tensor(chains.scores, dtype=torch.float64).reshape(len(PROMPTS), CHAINS)
    again = played_back(PROMPTS, table, method, process.schedule, process.looks[0], samples, process.prices)

    ends = chains.latents.reshape(len(PROMPTS), CHAINS)
    of_prompt = [group // samples for group in again.kept.groups]
    assert torch.equal(ends[of_prompt, again.kept.latents[:, 0].long()], drawn.kept.latents[:, 0])
    assert again.kept.origins == drawn.kept.origins and again.calls == drawn.calls


def test_a_node_that_nobody_looked_at_is_refused() -> None:
    table = torch.full((3, CHAINS, 9), torch.nan)
    process = begun([0] * 3, 1)
    with pytest.raises(AssertionError, match="nobody has looked at node 6"):
        played_back(PROMPTS, table, BestOf(4), process.schedule, process.looks[0], 3, process.prices)
