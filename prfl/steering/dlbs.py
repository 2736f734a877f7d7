"""Diffusion latent beam search (Oshima et al. 2025, arXiv 2501.19252): beams, their next states judged ahead.

    every beam makes ``children`` next states;  each is judged by a look ``lookahead`` deterministic steps later;
    the best ``chains`` of them all are the beams from here

A lookahead costs its steps for every child; its first call is then the next step's.  0 reads the state itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prfl.rollout.solvers import euler
from prfl.steering.chains import Chains, Steered
from prfl.steering.process import Process


@dataclass(frozen=True)
class BeamSearch:
    """chains: beams.  children: next states of each.  every: steps between two selections."""

    chains: int = 4
    keep: int = 1
    children: int = 2
    every: int = 4
    lookahead: int = 0

    def __call__(self, process: Process) -> Steered:
        chains = process.start(self.chains * self.children)  # each beam's children begin as noises of their own
        while chains.node < process.steps:
            if len(chains.rows_of(chains.groups[0])) == self.chains:
                parents = [row for row in range(len(chains)) for _ in range(self.children)]
                chains = process.evaluate(chains).select(parents).renumbered()
            chains = process.step_to(chains, min(chains.node + self.every, process.steps))
            chains = self.judged(process, chains)
            chains = process.keep_best(chains, self.chains if chains.node < process.steps else self.keep)
        return process.finish(chains)

    def judged(self, process: Process, chains: Chains) -> Chains:
        """The chains with the scores of where they lead to."""
        ahead = min(chains.node + self.lookahead, process.steps)
        if ahead == chains.node:
            return process.look(chains)
        chains = process.evaluate(chains)
        plain = replace(process, schedule=euler(process.schedule.sigmas))  # it counts for itself, from here on
        scores = plain.look(plain.step_to(chains, ahead)).scores
        process.calls = plain.calls
        return with_scores(chains, scores)


def with_scores(chains: Chains, scores: Sequence[float]) -> Chains:
    traces = [(*trace, (chains.node, score)) for trace, score in zip(chains.traces, scores, strict=True)]
    return replace(chains, traces=tuple(traces))
