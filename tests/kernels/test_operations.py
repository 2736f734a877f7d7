"""What holds of every operation, on a CPU: no tokens, and no derivative in forward mode, which is said."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from tests.kernels.operations import OPERATIONS, SEEDLESS, computed, leaves, plain_and_compiled


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "lora_linears"])  # that one is torch's own
@pytest.mark.parametrize("way", ["dual", "jvp"])
def test_forward_mode_is_refused(name: str, way: str) -> None:
    """With nothing else to differentiate, an operator would drop the tangent without a word."""
    given = {each: x.detach() for each, x in leaves(name, "cpu", torch.float32).items()}

    def run(x: torch.Tensor) -> torch.Tensor:
        return OPERATIONS[name][0]({**given, "x": x})[-1]

    tangent = torch.ones_like(given["x"])
    with pytest.raises(NotImplementedError, match="has no derivative in forward mode"):
        if way == "jvp":
            torch.func.jvp(run, (given["x"],), (tangent,))
        else:
            with forward_ad.dual_level():
                run(forward_ad.make_dual(given["x"], tangent))


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_tokens(name: str) -> None:
    given = leaves(name, "cpu", torch.float32, tokens=0)
    for each, value in computed(name, given).items():
        assert value.numel() == 0 or not value.any(), each


@pytest.mark.parametrize("name", SEEDLESS)
def test_compiled_is_the_same(name: str) -> None:
    """As traced: by torch 2.11 an output that was changed in place came back without a gradient."""
    for plain, traced in plain_and_compiled(name, leaves(name, "cpu", torch.float64), backend="eager"):
        torch.testing.assert_close(traced, plain, rtol=1e-12, atol=1e-12)
