"""Networks on a variance-preserving path as flow velocities, against diffusers' own DDIM."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler
from torch import Tensor

from prfl.backbone.flow_form import VariancePreserving, ended, start_size
from prfl.rollout.guidance import guided_network
from prfl.rollout.solvers import SOLVERS
from prfl.rollout.trajectory import rollout
from tests.toy_facts import toy_facts

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# As ModelScope's pipeline has it (its chain ends at the first timestep, not at data), and CogVideoX's.
NOISE = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
V = CogVideoXDDIMScheduler(
    **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0,
    timestep_spacing="trailing", set_alpha_to_one=True,
)  # fmt: skip
ON_PATH = toy_facts(variance_preserving=True)
STEPS = 5  # a divisor of 1000: else trailing timesteps are not those that a step goes to
WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2


def network(x: Tensor, timestep: Tensor) -> Tensor:
    """Of any prediction: what it predicts depends on latents and timestep."""
    time = timestep.to(x).reshape(-1, 1, 1, 1, 1) / 1000
    mixed = torch.einsum("bcthw,dc->bdthw", x, WEIGHT.to(x))
    return torch.tanh(mixed + time) + 0.1 * x


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("scheduler", [NOISE, V], ids=["noise", "v"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_euler_on_the_flow_is_ddim_on_the_path(scheduler, dtype: torch.dtype, bound: float) -> None:
    # In float64 the schedulers' table, kept in float32, is where the two must agree.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.to(dtype)
    scheduler.set_timesteps(STEPS)
    x = start(dtype)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep.expand(len(x))), timestep, x)[0]

    path, kind = VariancePreserving(scheduler.alphas_cumprod), scheduler.config.prediction_type
    final = float(scheduler.final_alpha_cumprod) ** 0.5
    last = (1 - final**2) ** 0.5 / (final + (1 - final**2) ** 0.5)
    sigmas = torch.cat([path.sigmas[scheduler.timesteps], torch.tensor([last], dtype=torch.float64)])
    flow = guided_network(lambda y, s, _: path.velocity(network, y, s, kind), None)  # type: ignore[arg-type]
    first = start(dtype) * start_size(ON_PATH, float(sigmas[0]))
    y = rollout(flow, first, SOLVERS["euler"](sigmas)).at(STEPS)
    assert (ended(ON_PATH, y, last) - x).abs().max() <= bound * x.abs().max()


@pytest.mark.parametrize("scheduler", [NOISE, V], ids=["noise", "v"])
def test_timesteps_and_sigmas_are_inverse(scheduler) -> None:
    """Exactly at the table's entries, in float64; between them in order."""
    path = VariancePreserving(scheduler.alphas_cumprod)
    numbers = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(path.timestep(path.sigmas), numbers, rtol=0, atol=1e-9)
    between = path.timestep((path.sigmas[1:] + path.sigmas[:-1]) / 2)
    torch.testing.assert_close(between, numbers[:-1] + 0.5, rtol=0, atol=1e-9)
    assert path.timestep(torch.tensor([0.0, 1.0])).tolist() == [0.0, 999.0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_network_that_is_right_gives_noise_less_data(kind: str) -> None:
    """At mixed sigmas, each sample by its own."""
    clean, noise = start(torch.float64), start(torch.float64).flip(1)
    sigma = torch.tensor([0.2, 0.9], dtype=torch.float64)
    each = sigma.reshape(-1, 1, 1, 1, 1)
    flow = (1 - each) * clean + each * noise
    size = (each.square() + (1 - each).square()).sqrt()
    a, b = (1 - each) / size, each / size
    right = noise if kind == "epsilon" else a * noise - b * clean

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        torch.testing.assert_close(x, a * clean + b * noise)
        assert timestep.shape == (2,) and timestep[0] < timestep[1]
        return right

    velocity = VariancePreserving(NOISE.alphas_cumprod).velocity(network, flow, sigma, kind)  # type: ignore[arg-type]
    torch.testing.assert_close(velocity, noise - clean)
