"""Every random draw is a function of (seed, purpose, step, global sample index).

So a resumed run, or one on another number of processes, draws the same prompts, noise, steps and sigmas.
Draws are made on the CPU and then moved: a device's own generator would give other numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def hashed(seed: int, purpose: str, step: int, index: int = 0) -> int:
    """Return 63 bits of a hash of the arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, step: int, index: int = 0) -> torch.Generator:
    """Make a CPU generator whose state is a hash of its arguments."""
    return torch.Generator().manual_seed(hashed(seed, purpose, step, index))


def seeds(seed: int, purpose: str, step: int, indices: Sequence[int]) -> Tensor:
    """Return seeds, (len(indices),) int64, for code with its own random generator, such as dropout."""
    return torch.tensor([hashed(seed, purpose, step, i) for i in indices])


def normal(shape: Sequence[int], seed: int, purpose: str, step: int, indices: Sequence[int]) -> Tensor:
    """Draw standard normal (len(indices), *shape), float32: one independent draw per global sample index."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, purpose, step, i)) for i in indices])


@dataclass(frozen=True)
class ChainNoises:
    """``noises[i]``: standard normal (len(indices), *shape) for step i of a chain of any length.

    Drawn again each time it is asked for, always the same: a chain's noise takes no memory.
    """

    shape: Sequence[int]
    seed: int
    step: int
    indices: Sequence[int]

    def __getitem__(self, i: int) -> Tensor:
        return normal(self.shape, self.seed, f"noise/{i}", self.step, self.indices)


def uniform(seed: int, purpose: str, step: int, indices: Sequence[int]) -> Tensor:
    """Draw uniform in [0, 1), (len(indices),), float64."""
    draws = [torch.rand((), generator=generator(seed, purpose, step, i), dtype=torch.float64) for i in indices]
    return torch.stack(draws)


def integer(high: int, seed: int, purpose: str, step: int, index: int = 0) -> int:
    """Draw one whole number in [0, high)."""
    return int(torch.randint(high, (), generator=generator(seed, purpose, step, index)))


def permutation(length: int, seed: int, purpose: str, epoch: int) -> list[int]:
    """Draw a random order of range(length); each epoch has a different one."""
    return torch.randperm(length, generator=generator(seed, purpose, epoch)).tolist()
