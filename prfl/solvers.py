"""Solvers as coefficients: every step of a chain is linear in the latents and in network outputs.

    x[i+1] = a[i] x[i] + sum over k of b[i][k] f[k] + c[i] noise[i]        f[k] = network(x[k], sigmas[k])

A one-step solver has b[i] = {i: factor}; a multistep one adds terms in earlier outputs k < i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.errors import PrflError


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The N steps of a chain.

    sigmas: (N + 1,) float64, what the network is told at each node, descending from noise.
    a, b, c: one entry per step, as in the module's equation; ``b[i]`` maps the evaluation k <= i to its factor.
    prediction: what the network predicts, "velocity" on x = (1 - sigma) x0 + sigma noise, or "epsilon" on
    x = sqrt(1 - sigma^2) x0 + sigma noise.
    """

    sigmas: Float[Tensor, " nodes"]
    a: tuple[float, ...]
    b: tuple[dict[int, float], ...]
    c: tuple[float, ...]
    prediction: Literal["velocity", "epsilon"] = "velocity"

    @property
    def steps(self) -> int:
        """N; the nodes are 0 (noise) to N (clean)."""
        return len(self.a)


def euler(sigmas: Float[Tensor, " nodes"]) -> Coefficients:
    """Euler on a rectified flow: x[i+1] = x[i] + (sigma[i+1] - sigma[i]) v[i]."""
    sigmas = sigmas.double().cpu()
    steps = len(sigmas) - 1
    b = tuple({i: change} for i, change in enumerate(sigmas.diff().tolist()))
    return Coefficients(sigmas, a=(1.0,) * steps, b=b, c=(0.0,) * steps)


def ddim(alphas_cumprod: Float[Tensor, " nodes"], eta: float = 0.0) -> Coefficients:
    """DDIM (Song et al. 2021, equation 12) on an epsilon network; alphas_cumprod: (N + 1,), ascending to the clean end.

        s = eta sqrt((1 - A') / (1 - A)) sqrt(1 - A / A')         A = alphas_cumprod[i], A' = alphas_cumprod[i+1]
        x[i+1] = sqrt(A' / A) x[i] + (sqrt(1 - A' - s^2) - sqrt(A' (1 - A) / A)) eps[i] + s noise[i]

    eta = 0 is deterministic, eta = 1 has DDPM's noise; PrflError outside that range.
    The network is told sigma = sqrt(1 - alphas_cumprod).
    """
    if not 0 <= eta <= 1:
        raise PrflError(f"DDIM with eta = {eta}", fix="choose eta from 0 (deterministic) to 1 (DDPM's noise)")
    signal = alphas_cumprod.double().cpu().tolist()
    a, b, c = [], [], []
    for i, (now, after) in enumerate(zip(signal[:-1], signal[1:], strict=True)):
        noise = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        # At eta = 1 on the last step the radicand is a zero that rounding may turn negative.
        direction = math.sqrt(max(1 - after - noise**2, 0.0))
        a.append(math.sqrt(after / now))
        b.append({i: direction - math.sqrt(after * (1 - now) / now)})
        c.append(noise)
    sigmas = (1 - torch.tensor(signal, dtype=torch.float64)).sqrt()
    return Coefficients(sigmas, tuple(a), tuple(b), tuple(c), prediction="epsilon")


def leap(coefficients: Coefficients, source: int, sigma: float) -> tuple[float, float]:
    """(a, b) of the one deterministic step x' = a x[source] + b f[source] to any ``sigma``; 0 is the clean prediction.

    velocity: a = 1, b = sigma - sigma[source].
    epsilon: a = alpha / alpha[source], b = sigma - a sigma[source], with alpha = sqrt(1 - sigma^2).
    """
    start = float(coefficients.sigmas[source])
    if coefficients.prediction == "velocity":
        return 1.0, sigma - start
    a = math.sqrt((1 - sigma**2) / (1 - start**2))
    return a, sigma - a * start


def renoised(
    coefficients: Coefficients, node: int, clean: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Clean latents noised to a node's sigma, in the convention of ``coefficients.prediction``."""
    sigma = float(coefficients.sigmas[node])
    signal = 1 - sigma if coefficients.prediction == "velocity" else math.sqrt(1 - sigma**2)
    return signal * clean + sigma * noise


def combine(
    latents: Float[Tensor, "*shape"],
    a: float,
    b: Mapping[int, float],
    outputs: Mapping[int, Tensor],
    c: float = 0.0,
    noise: Tensor | None = None,
) -> Float[Tensor, "*shape"]:
    """a x + sum over k of b[k] f[k] + c noise, in the dtype of the latents."""
    result = latents if a == 1 else a * latents
    for k, factor in b.items():
        result = torch.add(result, outputs[k], alpha=factor)
    if c != 0:
        assert noise is not None, f"a step with c = {c} needs its noise"
        result = torch.add(result, noise, alpha=c)
    return result.to(latents.dtype)


def unit_step_weight(coefficients: Coefficients) -> dict[int, float]:
    """Factors that make every step's parameter gradient weigh alike: mean |B| / |B[i]|, with B[i] = b[i][i].

    Under a shift |B| varies many-fold along the chain, so that a seed at the next latent weighs early steps down.
    """
    sizes = [abs(factors[i]) for i, factors in enumerate(coefficients.b)]
    mean = sum(sizes) / len(sizes)
    return {i: mean / size for i, size in enumerate(sizes)}
