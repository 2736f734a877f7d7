"""Best of N: chains are compared on the way, and the best of them go on.  Several decisions are successive halving.

A reward that reads noisy latents decides long before the end, as in TTSnap's pruning and PRISM (arXiv 2606.20310).

    N chains to the first decision;  the best n1 of them to the second;  ..  the best ``keep`` to the end

The numbers fall by one factor at each decision: n_j = N (keep / N)^(j / decisions), rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prfl.steering.chains import Steered
from prfl.steering.process import Process
from prfl.utils.schedule import node_at


@dataclass(frozen=True)
class BestOf:
    """decide_at: shares of the chain's steps, ascending; 1 is its end."""

    chains: int = 8
    keep: int = 1
    decide_at: Sequence[float] = (0.75,)

    def __call__(self, process: Process) -> Steered:
        chains = process.start(self.chains)
        for j, share in enumerate(self.decide_at, start=1):
            chains = process.look(process.step_to(chains, node_at(share, process.steps)))
            survivors = round(self.chains * (self.keep / self.chains) ** (j / len(self.decide_at)))
            chains = process.keep_best(chains, max(survivors, self.keep))
        return process.finish(process.step_to(chains, process.steps))
