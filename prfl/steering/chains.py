"""Several chains of each of a few videos: their latents at a node, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from prfl.steering.calls import Calls

Trace = tuple[tuple[int, float], ...]
"""The scores of a chain on its way: (node, score)."""


@dataclass(frozen=True, eq=False)
class Chains:
    """n chains at one node.

    groups: the video that each works for.  slots: their numbers in their groups, which name the noise of their steps.
    origins: the slots that they began with.
    outputs: network outputs f[k], each (n, ...), that later steps are made of; f[node] where it is known already.
    clean: the clean prediction that the last step went towards; None before the first.
    """

    latents: Float[Tensor, "n ..."]
    node: int
    groups: tuple[int, ...]
    slots: tuple[int, ...]
    origins: tuple[int, ...]
    traces: tuple[Trace, ...]
    outputs: Mapping[int, Tensor] = field(default_factory=dict)
    clean: Tensor | None = None

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def scores(self) -> list[float]:
        """The last score of each; 0 where nobody has looked."""
        return [trace[-1][1] if trace else 0.0 for trace in self.traces]

    def select(self, rows: Sequence[int]) -> Chains:
        """Take these rows, in this order; a row may be taken several times.  Slots stay: see ``renumbered``."""
        rows = list(rows)
        return replace(
            self,
            latents=self.latents[rows],
            groups=tuple(self.groups[row] for row in rows),
            slots=tuple(self.slots[row] for row in rows),
            origins=tuple(self.origins[row] for row in rows),
            traces=tuple(self.traces[row] for row in rows),
            outputs={k: output[rows] for k, output in self.outputs.items()},
            clean=None if self.clean is None else self.clean[rows],
        )

    def renumbered(self) -> Chains:
        """Number the chains of each group anew, so that copies of one chain get noise of their own."""
        counts: dict[int, int] = {}
        slots = []
        for group in self.groups:
            slots.append(counts.setdefault(group, 0))
            counts[group] += 1
        return replace(self, slots=tuple(slots))

    @cached_property
    def rows_by_group(self) -> Mapping[int, list[int]]:
        """The rows of each group, in their order; groups in the order of their first rows."""
        rows: dict[int, list[int]] = {}
        for row, group in enumerate(self.groups):
            rows.setdefault(group, []).append(row)
        return rows

    def rows_of(self, group: int) -> list[int]:
        return self.rows_by_group.get(group, [])

    def best(self, count: int) -> list[int]:
        """Rows of the ``count`` chains of each group with the highest last scores, the best first."""
        chosen: list[int] = []
        scores = self.scores
        for rows in self.rows_by_group.values():
            ranked = sorted(rows, key=lambda row: -scores[row])  # equal ones keep their order
            chosen += ranked[:count]
        return chosen


@dataclass(frozen=True, eq=False)
class Rejected:
    """A chain that was not finished: the video that it worked for, its first slot, and what it was to become.

    clean: (state), its clean prediction at ``node``, on the host.
    """

    group: int
    origin: int
    node: int
    trace: Trace
    clean: Tensor


@dataclass(frozen=True, eq=False)
class Steered:
    """What a method gives: finished chains by group, the best first, with all that happened on the way.

    calls: for all groups together.  log: facts by name, one list over the looks, such as effective sample sizes.
    """

    kept: Chains
    rejected: tuple[Rejected, ...]
    calls: Calls
    log: Mapping[str, Sequence[float]]
