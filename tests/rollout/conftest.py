"""A float64 toy network with parameters, a condition, and a dependence on sigma and on all latents of a sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

WIDTH = 3


class Toy(nn.Module):
    """f = W2 tanh(W1 x + u sigma + V condition) + g sigma x."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(*shape).double()) for shape in ((5, WIDTH), (WIDTH, 5)))
        self.u, self.g = nn.Parameter(torch.randn(5).double()), nn.Parameter(torch.randn(WIDTH).double())
        self.v = nn.Parameter(torch.randn(5, 2).double())
        self.calls = 0

    def forward(self, latents: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        self.calls += 1
        hidden = torch.tanh(latents @ self.w1.T + sigma * self.u + condition @ self.v.T)
        return hidden @ self.w2.T + self.g * sigma * latents


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


@pytest.fixture
def start() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, WIDTH, dtype=torch.float64)


@pytest.fixture
def conditions() -> tuple[Tensor, Tensor]:
    """(condition, empty condition) of two samples."""
    torch.manual_seed(2)
    return torch.randn(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
