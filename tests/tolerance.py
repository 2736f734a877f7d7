"""How far apart two right computations of one thing may lie: what follows from type, size and condition.

Processors add up in other orders (vector width, blocks of a matrix, fused multiply-add, threads), and so do batches of
one and of many.  A sum of n terms then differs by about eps sqrt(n) times the terms' size, because its roundings are
independent (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2); sums that follow each other add
their variances; where the terms are larger than what is left of them, so much larger is the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEVIATIONS = 6.0  # a difference has the two computations' deviations in it; the largest of many values is looked at


def tolerance(dtype: torch.dtype, terms: int, depth: int = 1, condition: float = 1.0) -> float:
    """The largest difference that rounding explains, relative to the largest value.

    terms: of the longest sum.  depth: how many such sums follow each other.  condition: the terms' size over that of
    what is left of them.
    """
    return DEVIATIONS * condition * torch.finfo(dtype).eps * (terms * depth) ** 0.5


def assert_near(
    found: Tensor, expected: Tensor, *, terms: int, depth: int = 1, condition: float = 1.0, name: str = ""
) -> None:
    """Both are right to the rounding of found's type; see ``tolerance``."""
    limit = tolerance(found.dtype, terms, depth, condition) * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit, msg=lambda text: f"{name} {text}")
