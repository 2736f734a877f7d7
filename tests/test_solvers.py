import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from prfl.errors import PrflError
from prfl.flow import add_noise, chain_sigmas, clean_prediction
from prfl.solvers import combine, ddim, euler, leap, unit_step_weight

F64 = torch.float64


def signal_levels(steps: int) -> torch.Tensor:
    """A cosine alphas_cumprod that ends clean."""
    return torch.cos(torch.linspace(1.4, 0, steps + 1, dtype=F64)) ** 2


def test_euler_is_exact_on_a_straight_path():
    clean, noise = torch.randn(2, 2, 3, dtype=F64)
    coefficients = euler(chain_sigmas(7, 5.0))
    x = noise
    for i in range(coefficients.steps):
        x = combine(x, coefficients.a[i], coefficients.b[i], {i: noise - clean})
        torch.testing.assert_close(x, add_noise(clean, noise, coefficients.sigmas[i + 1]))
    torch.testing.assert_close(x, clean)


def test_euler_equals_diffusers_on_equal_sigmas():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=chain_sigmas(6, 3.0)[:-1].tolist())
    coefficients = euler(chain_sigmas(6, 3.0))
    x = theirs = torch.randn(2, 3)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * theirs)
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
        x = combine(x, coefficients.a[i], coefficients.b[i], {i: velocity})
        torch.testing.assert_close(x, theirs)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_equals_diffusers(eta: float):
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, steps_offset=0)
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps.tolist()
    levels = torch.tensor([*scheduler.alphas_cumprod[timesteps].tolist(), 1.0], dtype=F64)
    coefficients = ddim(levels, eta)
    x = theirs = torch.randn(2, 3)
    for i, timestep in enumerate(timesteps):
        epsilon, noise = torch.sin(3 * theirs), torch.randn(2, 3)
        theirs = scheduler.step(epsilon, timestep, theirs, eta=eta, variance_noise=noise).prev_sample
        x = combine(x, coefficients.a[i], coefficients.b[i], {i: epsilon}, coefficients.c[i], noise)
        torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-4)  # theirs computes its levels in float32


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginal_of_gaussian_data(eta: float):
    """For data N(0, 1) every x[i] is N(0, 1) and the best epsilon is sigma x: a step nearly keeps variance 1."""
    coefficients = ddim(signal_levels(2000), eta)
    for i in (100, 1000, 1900):
        gain = coefficients.a[i] + coefficients.b[i][i] * float(coefficients.sigmas[i])
        # A continuous-time identity: what one step misses is of second order in its size.
        assert abs(gain**2 + coefficients.c[i] ** 2 - 1) < 1e-5


def test_ddim_refuses_eta_out_of_range():
    with pytest.raises(PrflError, match="eta"):
        ddim(signal_levels(4), eta=1.5)


def test_leap_recovers_the_clean_sample_and_composes_with_the_step():
    clean, noise = torch.randn(2, 2, 3, dtype=F64)
    flow, diffusion = euler(chain_sigmas(5, 2.0)), ddim(signal_levels(5))
    sigma = flow.sigmas[2]
    x = add_noise(clean, noise, sigma)
    a, b = leap(flow, 2, 0.0)
    torch.testing.assert_close(a * x + b * (noise - clean), clean)
    torch.testing.assert_close(a * x + b * (noise - clean), clean_prediction(x, noise - clean, sigma))

    level = float(diffusion.sigmas[2])
    x = math.sqrt(1 - level**2) * clean + level * noise
    a, b = leap(diffusion, 2, 0.0)
    torch.testing.assert_close(a * x + b * noise, clean)

    for coefficients in (flow, diffusion):  # a leap to the next node is the deterministic step
        a, b = leap(coefficients, 2, float(coefficients.sigmas[3]))
        assert (a, b) == pytest.approx((coefficients.a[2], coefficients.b[2][2]))


def test_unit_step_weight_makes_every_step_weigh_alike_and_keeps_the_mean():
    coefficients = euler(chain_sigmas(40, 5.0))
    sizes = [abs(coefficients.b[i][i]) for i in range(40)]
    assert max(sizes) / min(sizes) == pytest.approx(22, abs=1)
    weighed = [size * unit_step_weight(coefficients)[i] for i, size in enumerate(sizes)]
    assert weighed == pytest.approx([sum(sizes) / 40] * 40)


def test_combine_keeps_the_dtype_of_the_latents():
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    output = torch.randn(2, 3)
    assert combine(x, 1.0, {0: -0.1}, {0: output}).dtype == torch.bfloat16
    assert combine(output, 0.5, {0: -0.1}, {0: x}).dtype == torch.float32
