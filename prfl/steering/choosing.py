"""Draws by weights: which chains go on, and which of a chain's next states is taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prfl.steering.chains import Chains
from prfl.steering.process import Process


def systematic(log_weights: Float[Tensor, " n"], offset: float) -> Int[Tensor, " n"]:
    """Systematic resampling: n rows, row k about n w[k] times (its mean is n w[k], and it differs by less than one).

    offset: uniform in [0, 1).  Equal weights give every row once, in order.
    """
    count = len(log_weights)
    ends = torch.softmax(log_weights.double(), 0).cumsum(0) * count
    # Away from the ends of equal weights, so that rounding puts no point on their wrong side.
    points = torch.arange(count, dtype=torch.float64) + min(max(offset, 1e-9), 1 - 1e-9)
    return torch.searchsorted(ends, points, right=True).clamp(max=count - 1)


def one_of(log_weights: Float[Tensor, " n"], draw: float) -> int:
    """One row, drawn in proportion to the weights.  draw: uniform in [0, 1)."""
    ends = torch.softmax(log_weights.double(), 0).cumsum(0)
    return min(int(torch.searchsorted(ends, draw, right=True)), len(log_weights) - 1)


def effective_size(log_weights: Float[Tensor, " n"]) -> float:
    """How many equal weights would vary as these do: 1 / sum of squares; n where they are equal."""
    return float(1 / torch.softmax(log_weights.double(), 0).square().sum())


def resampled_rows(process: Process, chains: Chains, log_weights: Sequence[float], purpose: str) -> list[int]:
    """Draw each group's chains anew by their weights; those that nobody drew are rejected.

    Take them by ``chains.select(rows).renumbered()``: copies get noise of their own.
    """
    rows: list[int] = []
    weights = torch.tensor(log_weights, dtype=torch.float64)
    for group, members in chains.rows_by_group.items():
        offset = process.uniform(group, chains.node, purpose)
        rows += [members[k] for k in systematic(weights[members], offset).tolist()]
    process.reject(chains, sorted(set(range(len(chains))) - set(rows)))
    return rows


def distinct(chains: Chains) -> Chains:
    """Without the copies that resampling has left side by side."""
    rows: list[int] = []
    for row, group in enumerate(chains.groups):
        earlier = [other for other in rows if chains.groups[other] == group]
        if not any(torch.equal(chains.latents[row], chains.latents[other]) for other in earlier):
            rows.append(row)
    return chains.select(rows)
