import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from prfl.rollout.flow import add_noise, chain_sigmas, clean_prediction
from prfl.rollout.solvers import (
    SolverSchedule,
    ancestral,
    combine,
    ddim,
    euler,
    flow_sde,
    leap,
    unipc,
    unit_step_weight,
)
from prfl.utils.errors import PrflError

F64 = torch.float64


def signal_levels(steps: int) -> torch.Tensor:
    """A cosine alphas_cumprod that ends clean."""
    return torch.cos(torch.linspace(1.4, 0, steps + 1, dtype=F64)) ** 2


def test_euler_is_exact_on_a_straight_path():
    clean, noise = torch.randn(2, 2, 3, dtype=F64)
    schedule = euler(chain_sigmas(7, 5.0))
    x = noise
    for i in range(schedule.steps):
        x = combine(x, schedule.a[i], schedule.b[i], {i: noise - clean})
        torch.testing.assert_close(x, add_noise(clean, noise, schedule.sigmas[i + 1]))
    torch.testing.assert_close(x, clean)


def test_euler_equals_diffusers_on_equal_sigmas():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=chain_sigmas(6, 3.0)[:-1].tolist())
    schedule = euler(chain_sigmas(6, 3.0))
    x = theirs = torch.randn(2, 3)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * theirs)
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
        x = combine(x, schedule.a[i], schedule.b[i], {i: velocity})
        torch.testing.assert_close(x, theirs)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_equals_diffusers(eta: float):
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, steps_offset=0)
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps.tolist()
    levels = torch.tensor([*scheduler.alphas_cumprod[timesteps].tolist(), 1.0], dtype=F64)
    schedule = ddim(levels, eta)
    x = theirs = torch.randn(2, 3)
    for i, timestep in enumerate(timesteps):
        epsilon, noise = torch.sin(3 * theirs), torch.randn(2, 3)
        theirs = scheduler.step(epsilon, timestep, theirs, eta=eta, variance_noise=noise).prev_sample
        x = combine(x, schedule.a[i], schedule.b[i], {i: epsilon}, schedule.c[i], noise)
        torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-4)  # theirs computes its levels in float32


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_marginal_of_gaussian_data(eta: float):
    """For data N(0, 1) every x[i] is N(0, 1) and the best epsilon is sigma x: a step nearly keeps variance 1."""
    schedule = ddim(signal_levels(2000), eta)
    for i in (100, 1000, 1900):
        gain = schedule.a[i] + schedule.b[i][i] * float(schedule.sigmas[i])
        # A continuous-time identity: what one step misses is of second order in its size.
        assert abs(gain**2 + schedule.c[i] ** 2 - 1) < 1e-5


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

    for schedule in (flow, diffusion):  # a leap to the next node is the deterministic step
        a, b = leap(schedule, 2, float(schedule.sigmas[3]))
        assert (a, b) == pytest.approx((schedule.a[2], schedule.b[2][2]))


def test_unit_step_weight_makes_every_step_weigh_alike_and_keeps_the_mean():
    schedule = euler(chain_sigmas(40, 5.0))
    sizes = [abs(schedule.b[i][i]) for i in range(40)]
    assert max(sizes) / min(sizes) == pytest.approx(22, abs=1)
    weighed = [size * unit_step_weight(schedule)[i] for i, size in enumerate(sizes)]
    assert weighed == pytest.approx([sum(sizes) / 40] * 40)


def test_unit_step_weight_of_a_multistep_solver_is_of_each_steps_own_output():
    schedule = unipc(chain_sigmas(10, 3.0))
    weights = unit_step_weight(schedule)
    assert set(weights) == set(range(10))
    weighed = [abs(schedule.b[i][i]) * weights[i] for i in range(10)]
    assert weighed == pytest.approx([sum(abs(b[i]) for i, b in enumerate(schedule.b)) / 10] * 10)


def test_unit_step_weight_leaves_out_steps_without_their_own_output():
    b = ({0: -0.2}, {0: -0.3}, {2: 0.0, 1: -0.1}, {3: -0.4, 1: 5.0})
    assert unit_step_weight(SolverSchedule(torch.linspace(1, 0, 5), (1.0,) * 4, b, (0.0,) * 4)) == pytest.approx(
        {0: 1.5, 3: 0.75}
    )
    assert unit_step_weight(SolverSchedule(torch.linspace(1, 0, 2), (1.0,), ({},), (0.0,))) == {}


def test_flow_sde_without_noise_is_euler():
    sigmas = chain_sigmas(12, 5.0)
    one, other = flow_sde(sigmas, 0.0), euler(sigmas)
    assert (one.a, one.b, one.c) == (other.a, other.b, other.c)


def test_flow_sde_is_flow_grpos_step():
    """Mean and deviation as the paper writes them, on tensors; the step to sigma 0 is Euler's."""
    sigmas, eta = chain_sigmas(8, 3.0), 0.7
    schedule = flow_sde(sigmas, eta)
    x, v, noise = torch.randn(3, 2, 3, dtype=F64)
    for i in range(7):
        t, dt = sigmas[i], sigmas[i] - sigmas[i + 1]
        std = eta * torch.sqrt(t / (1 - (sigmas[1] if i == 0 else t)))
        score = -(x + (1 - t) * v) / t
        expected = x - (v - std**2 / 2 * score) * dt + std * torch.sqrt(dt) * noise
        got = combine(x, schedule.a[i], schedule.b[i], {i: v}, schedule.c[i], noise)
        torch.testing.assert_close(got, expected)
    last = float(sigmas[7])
    assert schedule.a[7] == 1 and schedule.b[7] == {7: -last} and schedule.c[7] == 0
    assert flow_sde(sigmas[[0, 8]], eta).b == euler(sigmas[[0, 8]]).b, "one step from sigma 1 to 0"


MEAN, SPREAD = 1.5, 0.4


def gaussian_velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[noise - x0 | x] for data N(MEAN, SPREAD^2)."""
    signal = 1 - sigma
    variance = signal**2 * SPREAD**2 + sigma**2
    centred = (x - signal * MEAN) / variance
    return sigma * centred - (MEAN + signal * SPREAD**2 * centred)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_flow_sde_keeps_the_marginals_of_gaussian_data(eta: float):
    """Every latent of a chain of 400 steps is distributed as noised data."""
    samples, steps = 40_000, 400
    schedule = flow_sde(chain_sigmas(steps, 3.0), eta)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, dtype=F64, generator=generator)
    for i in range(steps):
        output = {i: gaussian_velocity(x, schedule.sigmas[i])}
        noise = torch.randn(samples, dtype=F64, generator=generator)
        x = combine(x, schedule.a[i], schedule.b[i], output, schedule.c[i], noise)
        sigma = float(schedule.sigmas[i + 1])
        variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
        if sigma < 0.9:  # above, where g grows without bound, the first steps are coarse however many there are
            assert float(x.mean()) == pytest.approx((1 - sigma) * MEAN, abs=4 * math.sqrt(variance / samples) + 0.005)
            assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / samples) + 0.01)


def test_flow_sde_refuses_eta_out_of_range():
    with pytest.raises(PrflError, match="eta"):
        flow_sde(chain_sigmas(4, 1.0), eta=1.5)


def test_combine_keeps_the_dtype_of_the_latents():
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    output = torch.randn(2, 3)
    assert combine(x, 1.0, {0: -0.1}, {0: output}).dtype == torch.bfloat16
    assert combine(output, 0.5, {0: -0.1}, {0: x}).dtype == torch.float32


def gaussian_end(schedule: SolverSchedule) -> tuple[float, float]:
    """Mean and deviation of a chain's end for data N(MEAN, SPREAD^2): its steps are linear in x, so they are exact."""
    mean, variance = 0.0, 1.0
    for i in range(schedule.steps):
        at = [float(gaussian_velocity(torch.tensor(x, dtype=F64), schedule.sigmas[i])) for x in (0.0, 1.0)]
        slope = schedule.a[i] + schedule.b[i][i] * (at[1] - at[0])
        mean, variance = slope * mean + schedule.b[i][i] * at[0], slope**2 * variance + schedule.c[i] ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_keeps_the_marginals_of_gaussian_data(eta: float):
    """To first order in the steps, whatever the noise."""
    ends = [gaussian_end(ancestral(chain_sigmas(steps, 3.0), eta)) for steps in (100, 1000)]
    assert [mean for mean, _ in ends] == [pytest.approx(MEAN)] * 2
    few, many = (SPREAD - deviation for _, deviation in ends)
    assert 0 < many < few / 8 and many < 0.01 * SPREAD


def test_ancestral_is_noise_anew_on_the_clean_prediction():
    """eta = 1 is the posterior of x[i+1] given x[i] and x0, written by Bayes' rule; eta = 0 is Euler."""
    sigmas = chain_sigmas(6, 3.0)
    schedule, x0, noise = ancestral(sigmas, 1.0), torch.tensor(0.3, dtype=F64), torch.tensor(-0.8, dtype=F64)
    for i in range(1, 5):
        s, t = sigmas[i], sigmas[i + 1]
        x = (1 - s) * x0 + s * noise
        r = (1 - s) / (1 - t)  # x[i] given x[i+1]: r x[i+1] and this variance
        spread = s**2 - r**2 * t**2
        precision = 1 / t**2 + r**2 / spread
        expected = ((1 - t) * x0 / t**2 + r * x / spread) / precision
        got = combine(x, schedule.a[i], schedule.b[i], {i: noise - x0}, 0.0)
        torch.testing.assert_close(got, expected)
        assert schedule.c[i] ** 2 == pytest.approx(float(1 / precision))
    plain = euler(sigmas)
    for i, (a, b) in enumerate(zip(ancestral(sigmas, 0.0).a, ancestral(sigmas, 0.0).b, strict=True)):
        assert (a, b[i]) == (pytest.approx(1), pytest.approx(plain.b[i][i]))
    with pytest.raises(PrflError, match="eta"):
        ancestral(sigmas, 1.5)
