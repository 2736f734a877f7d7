import pytest
import torch

from prfl.rollout.guidance import guided_network
from prfl.utils.errors import PrflError


def parameter_gradient(toy, value: torch.Tensor) -> list[torch.Tensor]:
    return torch.autograd.grad(value.sin().sum(), list(toy.parameters()))


@pytest.mark.parametrize("gradient", ["cond", "both"])
def test_guidance_extrapolates_from_the_empty_condition(toy, start, conditions, gradient):
    sigma = torch.tensor(0.7, dtype=torch.float64)
    full, empty = (toy(start, sigma, condition) for condition in conditions)
    toy.calls = 0
    network = guided_network(toy, *conditions, scale=4.0, gradient=gradient)
    torch.testing.assert_close(network(start, sigma), empty + 4.0 * (full - empty))
    assert toy.calls == 2
    with torch.no_grad():
        assert not network(start, sigma).requires_grad  # "both" does not switch autograd on inside a rollout


def test_where_the_gradient_goes(toy, start, conditions):
    """cond stops the unconditional branch, both does not; their gradients differ."""
    sigma = torch.tensor(0.7, dtype=torch.float64)
    x = start.clone().requires_grad_()
    full, empty = (toy(x, sigma, condition) for condition in conditions)
    expected = {
        "cond": empty.detach() + 4.0 * (full - empty.detach()),
        "both": empty + 4.0 * (full - empty),
    }
    got = {}
    for mode, value in expected.items():
        network = guided_network(toy, *conditions, scale=4.0, gradient=mode)
        y = start.clone().requires_grad_()
        inputs, outputs = [x, *toy.parameters()], [y, *toy.parameters()]
        wanted = torch.autograd.grad(value.sin().sum(), inputs, retain_graph=True)
        got[mode] = torch.autograd.grad(network(y, sigma).sin().sum(), outputs)
        torch.testing.assert_close(got[mode], wanted)
    assert not torch.allclose(got["cond"][0], got["both"][0])
    assert not torch.allclose(got["cond"][1], got["both"][1])


@pytest.mark.parametrize("gradient", ["none", "cond", "both"])
def test_scale_one_is_one_plain_call(toy, start, conditions, gradient):
    sigma = torch.tensor(0.7, dtype=torch.float64)
    expected = toy(start, sigma, conditions[0])
    toy.calls = 0
    assert torch.equal(guided_network(toy, *conditions, scale=1.0, gradient=gradient)(start, sigma), expected)
    assert toy.calls == 1


def test_misuse_is_refused(toy, conditions):
    with pytest.raises(PrflError, match="gradient 'none'"):
        guided_network(toy, *conditions, scale=3.0, gradient="none")
    with pytest.raises(PrflError, match="empty condition"):
        guided_network(toy, conditions[0], scale=3.0, gradient="cond")
