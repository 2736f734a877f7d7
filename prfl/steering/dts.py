"""Diffusion tree sampling (DTS, and its greedy form DTS*): rollouts share beginnings, and their rewards go back up.

    down the tree a child is taken in proportion to exp(strength v), or greedily the highest v + sqrt(log n / own n)
    a node with fewer than ``width`` children gets a new one, which is rolled out to its end and looked at: v = r(x0)
    up again:  v = log mean over children of exp(strength v(child)) / strength                   the soft Bellman backup

A node is ``every`` steps long, n are visits.  The cost depends on where new children begin: ``chains`` whole chains at
most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from prfl.steering.calls import Calls
from prfl.steering.chains import Chains, Steered
from prfl.steering.choosing import one_of
from prfl.steering.process import Process

VISITS = 8  # walks down the tree for each whole chain that may be spent, as far as these find nothing to expand


@dataclass(eq=False)
class Node:
    """chains: one, at this node; None at the root, whose children begin with noises."""

    chains: Chains | None
    children: list[Node] = field(default_factory=list)
    value: float = 0.0
    visits: int = 0


@dataclass(frozen=True)
class TreeSearch:
    """chains: whole chains' worth of steps that a video may cost.  The drawn leaf comes first, then the best ones."""

    chains: int = 8
    keep: int = 1
    strength: float = 1.0
    width: int = 3
    every: int = 5
    greedy: bool = False

    def __call__(self, process: Process) -> Steered:
        starts, kept = process.start(self.width), []
        if process.counting:
            process.calls += self.most(process)
            return process.finish(process.blank(starts.select([0] * self.keep)))
        for group in process.groups:
            leaves = Tree(self, process, starts.select(starts.rows_of(group)), group).grown()
            kept += leaves[: self.keep]
        return process.finish(joined(kept))

    def most(self, process: Process) -> Calls:
        """What a video costs at most: all its steps, and a look at a leaf for each of the shortest new branches."""
        steps = self.chains * process.steps
        leaves, looks = steps // min(self.every, process.steps), process.looks
        decodes = sum(look.decodes for look in looks) * process.prices.decode
        reward = sum(look.calls for look in looks)
        return Calls(steps * process.prices.step, leaves * reward, leaves * decodes)


class Tree:
    """The tree of one video."""

    def __init__(self, settings: TreeSearch, process: Process, starts: Chains, group: int) -> None:
        self.settings, self.process, self.starts, self.group = settings, process, starts, group
        self.root = Node(None)
        self.leaves: list[Node] = []
        self.spent, self.born = 0, 0  # steps; children, whose numbers name their noise

    def grown(self) -> list[Chains]:
        """Spend the steps; returns the leaves' chains, first the one that is drawn."""
        budget = self.settings.chains * self.process.steps
        for visit in range(VISITS * self.settings.chains):
            path = self.walk(f"down/{visit}", expanding=True)
            if path[-1] not in self.leaves:
                cost = self.process.steps - (path[-1].chains.node if path[-1].chains else 0)
                if self.spent + cost > budget:
                    break
                path += self.rolled_out(path[-1])
            self.back_up(path)
        best = sorted(self.leaves, key=lambda leaf: -leaf.value)
        if not self.settings.greedy:
            drawn = self.walk("drawn", expanding=False)[-1]
            best = [drawn, *(leaf for leaf in best if leaf is not drawn)]
        return [leaf.chains for leaf in best if leaf.chains is not None]

    def walk(self, purpose: str, expanding: bool) -> list[Node]:
        """From the root to a leaf, or to a node that lacks children."""
        path = [self.root]
        while path[-1].children and not (expanding and len(path[-1].children) < self.settings.width):
            path.append(self.chosen(path[-1], f"{purpose}/{len(path)}"))
        return path

    def chosen(self, node: Node, purpose: str) -> Node:
        values = torch.tensor([child.value for child in node.children], dtype=torch.float64)
        if self.settings.greedy:
            visits = torch.tensor([child.visits for child in node.children], dtype=torch.float64)
            return node.children[int((values + (math.log(max(node.visits, 1)) / visits).sqrt()).argmax())]
        draw = self.process.uniform(self.group, 0, f"dts/{purpose}")
        return node.children[one_of(self.settings.strength * values, draw)]

    def rolled_out(self, node: Node) -> list[Node]:
        """A new child and all below it, down to its leaf."""
        self.born += 1
        chains = self.starts.select([self.born - 1]) if node.chains is None else self.sibling(node.chains)
        branch: list[Node] = []
        while chains.node < self.process.steps:
            after = min(chains.node + self.settings.every, self.process.steps)
            self.spent += after - chains.node
            chains = self.process.step_to(chains, after)
            if after == self.process.steps:
                chains = self.process.look(chains)
            child = Node(chains, value=chains.scores[0])
            (branch[-1] if branch else node).children.append(child)
            branch.append(child)
        self.leaves.append(branch[-1])
        return branch

    def sibling(self, chains: Chains) -> Chains:
        """The same state, to be gone on from with another noise."""
        return replace(chains, slots=(self.starts.slots[-1] + self.born,))

    def back_up(self, path: list[Node]) -> None:
        for node in reversed(path):
            node.visits += 1
            if node.children and self.settings.strength:
                values = self.settings.strength * torch.tensor([c.value for c in node.children], dtype=torch.float64)
                node.value = float(values.logsumexp(0) - math.log(len(values))) / self.settings.strength
            elif node.children:
                node.value = sum(child.value for child in node.children) / len(node.children)


def joined(parts: list[Chains]) -> Chains:
    """One batch of chains that are all at the end."""
    return Chains(
        torch.cat([part.latents for part in parts]),
        parts[0].node,
        tuple(group for part in parts for group in part.groups),
        tuple(slot for part in parts for slot in part.slots),
        tuple(origin for part in parts for origin in part.origins),
        tuple(trace for part in parts for trace in part.traces),
    )
