"""The engine of all methods: it steps chains, looks at them, and counts what both cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone.condition import Condition
from prfl.rollout.flow import add_noise
from prfl.rollout.sampling import start_noise
from prfl.rollout.solvers import SolverSchedule, combine, leap
from prfl.rollout.trajectory import sigma_at
from prfl.steering.calls import Calls, Prices
from prfl.steering.chains import Chains, Rejected, Steered
from prfl.utils import rng

Read = Callable[[Tensor, Tensor, Condition], Tensor]
"""(latents (n, ...), sigma (), condition of n) -> (n,): a network's output there, or a score."""


@dataclass(frozen=True)
class Look:
    """One reward as steering reads it.

    clean: it reads clean predictions, at sigma 0, and not the noisy latents.  calls: that one reading of one sample
    costs.  decodes: how many videos it decodes for that.  held: what is active around a read and its backward pass.
    levels: noise levels at which it reads finished chains, noised again, in place of their clean latents.
    """

    read: Read
    clean: bool = False
    weight: float = 1.0
    calls: float = 0.0
    decodes: int = 0
    held: Callable[[], AbstractContextManager] = nullcontext
    levels: Sequence[float] = ()


@dataclass
class Process:
    """Chains of the videos that ``condition`` and ``indices`` name, one group each.

    indices: which sample of its prompt each video is.  state: the shape of one sample's latents.
    begin: makes the chain's first latents of standard normal noise.  end: those that are decoded, of its last.
    start_size: standard deviation of the first.  batch: samples in one network call.
    held: what must be active around a network call and its backward pass.
    counting: nothing is drawn, and a method whose costs depend on its scores is to cost the most that it may.
    """

    network: Read
    schedule: SolverSchedule
    looks: Sequence[Look]
    condition: Condition
    indices: Sequence[int]
    state: Sequence[int]
    seed: int = 0
    prices: Prices = Prices()
    batch: int = 32
    begin: Callable[[Tensor, Condition], Tensor] = lambda noise, condition: noise
    end: Callable[[Tensor], Tensor] = lambda latents: latents
    start_size: float = 1.0
    held: Callable[[], AbstractContextManager] = nullcontext
    counting: bool = False
    calls: Calls = Calls()
    rejected: list[Rejected] = field(default_factory=list)
    log: dict[str, list[float]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.schedule.steps

    @property
    def groups(self) -> range:
        return range(len(self.condition))

    def parts(self, count: int) -> Iterator[slice]:
        """So many samples, as many at a time as a network call takes."""
        for first in range(0, count, self.batch):
            yield slice(first, first + self.batch)

    # --- chains ------------------------------------------------------------------------------------------------------

    def start(self, count: int) -> Chains:
        """Begin ``count`` chains of each group: chain k of video i has the noise of the prompt's sample i count + k."""
        groups = tuple(group for group in self.groups for _ in range(count))
        slots = tuple(slot for _ in self.groups for slot in range(count))
        condition = self.condition[list(groups)]
        numbers = [self.indices[group] * count + slot for group, slot in zip(groups, slots, strict=True)]
        noise = start_noise(self.state, self.seed, [ask.prompt for ask in condition.asks], numbers)
        latents = self.begin(noise, condition)
        return Chains(latents, 0, groups, slots, origins=slots, traces=((),) * len(groups))

    @torch.no_grad()
    def evaluate(self, chains: Chains) -> Chains:
        """Call the network at the chains' node, where that was not done before."""
        if chains.node in chains.outputs:
            return chains
        output = self.velocity(chains.latents, chains.node, chains.groups)
        return replace(chains, outputs={**chains.outputs, chains.node: output})

    def velocity(self, latents: Tensor, node: int, groups: Sequence[int]) -> Tensor:
        """The network's output, some samples at a time; counted."""
        sigma, parts = sigma_at(self.schedule, node, latents), []
        for part in self.parts(len(latents)):
            parts.append(self.network(latents[part], sigma, self.condition[list(groups[part])]))
        self.calls += Calls(policy=len(latents) * self.prices.at(self.schedule.sigmas[node]))
        return torch.cat(parts)

    @torch.no_grad()
    def step(self, chains: Chains) -> Chains:
        """Take the solver's step to the next node."""
        chains, i, schedule = self.evaluate(chains), chains.node, self.schedule
        noise = self.noise(chains).to(chains.latents) if schedule.c[i] else None
        latents = combine(chains.latents, schedule.a[i], schedule.b[i], chains.outputs, schedule.c[i], noise)
        clean = self._clean(chains)
        needed = set().union(*schedule.b[i + 1 :])
        outputs = {k: output for k, output in chains.outputs.items() if k in needed}
        return replace(chains, latents=latents, node=i + 1, outputs=outputs, clean=clean)

    def step_to(self, chains: Chains, node: int) -> Chains:
        while chains.node < node:
            chains = self.step(chains)
        return chains

    def noise(self, chains: Chains) -> Tensor:
        """Standard normal (n, ...) for the step from the chains' node: a function of video, slot and node alone."""
        draws = []
        for group, slot in zip(chains.groups, chains.slots, strict=True):
            purpose = f"steer/{self.condition.asks[group].prompt}/{self.indices[group]}"
            draws.append(rng.normal(self.state, self.seed, purpose, chains.node, [slot]))
        return torch.cat(draws)

    def uniform(self, group: int, node: int, purpose: str) -> float:
        """One draw in [0, 1) for a group's choice at a node."""
        name = f"{purpose}/{self.condition.asks[group].prompt}/{self.indices[group]}"
        return float(rng.uniform(self.seed, name, node, [0]))

    # --- scores ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def look(self, chains: Chains) -> Chains:
        """Read the rewards: every chain's trace gets its score at this node."""
        total = torch.zeros(len(chains), dtype=torch.float64)
        sigma = sigma_at(self.schedule, chains.node, chains.latents)
        for look in self.looks:
            if look.levels and chains.node == self.steps:
                scores = self.read_again(look, chains)
            else:
                chains, latents = self.clean_prediction(chains) if look.clean else (chains, chains.latents)
                at = torch.zeros_like(sigma) if look.clean else sigma
                scores = self.read(look, latents, at, chains.groups)
            total += look.weight * scores.double().cpu()
        traces = [(*trace, (chains.node, score)) for trace, score in zip(chains.traces, total.tolist(), strict=True)]
        return replace(chains, traces=tuple(traces))

    def read(self, look: Look, latents: Tensor, sigma: Tensor, groups: Sequence[int]) -> Float[Tensor, " n"]:
        """One reward's scores, some samples at a time; counted."""
        parts = []
        for part in self.parts(len(latents)):
            parts.append(look.read(latents[part], sigma, self.condition[list(groups[part])]))
        self.calls += Calls(reward=len(latents) * look.calls, decodes=len(latents) * look.decodes * self.prices.decode)
        return torch.cat(parts)

    def read_again(self, look: Look, chains: Chains) -> Float[Tensor, " n"]:
        """The mean of one reward's scores of finished chains, noised to each of its levels.

        A head ranks noisy latents better than clean ones.  All chains of a video have the same noise, so that chance
        prefers none of them.
        """
        clean, parts = self.end(chains.latents), []
        for number, level in enumerate(look.levels):
            noise = torch.cat([self.noise_again(group, number) for group in self.groups])[list(chains.groups)]
            sigma = torch.tensor(level, dtype=torch.promote_types(clean.dtype, torch.float32), device=clean.device)
            parts.append(self.read(look, add_noise(clean, noise.to(clean), sigma), sigma, chains.groups))
        return torch.stack(parts).mean(0)

    def noise_again(self, group: int, number: int) -> Tensor:
        """Standard normal (1, ...) for the ``number``-th reading of a group's finished chains."""
        purpose = f"again/{self.condition.asks[group].prompt}/{self.indices[group]}"
        return rng.normal(self.state, self.seed, purpose, number, [0])

    def clean_prediction(self, chains: Chains) -> tuple[Chains, Tensor]:
        """What the chains are to become.  It costs nothing behind a step without noise, and else the call at this node,
        which the next step then has."""
        if chains.node == self.steps:
            return chains, self.end(chains.latents)
        if chains.clean is not None and not self.schedule.c[chains.node - 1]:
            return chains, chains.clean
        chains = self.evaluate(chains)
        return chains, self._clean(chains)

    def _clean(self, chains: Chains) -> Tensor:
        a, b = leap(self.schedule, chains.node, 0.0)
        return combine(chains.latents, a, {chains.node: b}, chains.outputs)

    # --- results -----------------------------------------------------------------------------------------------------

    def keep_best(self, chains: Chains, count: int) -> Chains:
        """Go on with the best ``count`` chains of each group; the others are rejected."""
        rows = chains.best(count)
        self.reject(chains, sorted(set(range(len(chains))) - set(rows)))
        return chains.select(rows)

    def reject(self, chains: Chains, rows: Sequence[int]) -> None:
        """Note chains that do not go on, as far as what they were to become is known without another call."""
        if chains.node in chains.outputs:
            clean: Tensor | None = self._clean(chains)
        else:
            clean = self.end(chains.latents) if chains.node == self.steps else chains.clean
        assert clean is not None, "chains are rejected behind a step"
        for row in rows:
            facts = chains.groups[row], chains.origins[row], chains.node, chains.traces[row]
            self.rejected.append(Rejected(*facts, clean[row].float().cpu()))

    def blank(self, chains: Chains) -> Chains:
        """The chains as if they were at the end, where only calls are counted."""
        return replace(chains, node=self.steps)

    def note(self, name: str, value: float) -> None:
        self.log.setdefault(name, []).append(value)

    def finish(self, chains: Chains) -> Steered:
        assert chains.node == self.steps, f"node {chains.node} of a chain of {self.steps}"
        return Steered(replace(chains, latents=self.end(chains.latents)), tuple(self.rejected), self.calls, self.log)
