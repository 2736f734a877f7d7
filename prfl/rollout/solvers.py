"""Solvers as coefficients: every step of a chain is linear in the latents and in network outputs.

    x[i+1] = a[i] x[i] + sum over k of b[i][k] f[k] + c[i] noise[i]        f[k] = network(x[k], sigmas[k])

A one-step solver has b[i] = {i: factor}; a multistep solver adds terms in earlier outputs k < i.  x[i] is always the
state at which the network is called for f[i], so that one adjoint serves every solver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.utils.errors import PrflError

Evaluation = TypeVar("Evaluation")  # identifies a network evaluation: a step of the chain, or a node of a plan


@dataclass(frozen=True, eq=False)
class SolverSchedule:
    """The N steps of a chain.

    sigmas: (N + 1,) float64, the noise level that the network gets at each node, descending from noise.
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


def euler(sigmas: Float[Tensor, " nodes"]) -> SolverSchedule:
    """Euler on a rectified flow: x[i+1] = x[i] + (sigma[i+1] - sigma[i]) v[i]."""
    sigmas = sigmas.double().cpu()
    steps = len(sigmas) - 1
    b = tuple({i: change} for i, change in enumerate(sigmas.diff().tolist()))
    return SolverSchedule(sigmas, a=(1.0,) * steps, b=b, c=(0.0,) * steps)


NEARLY_ONE = 1 - 1e-6
"""The sigma that UniPC uses in place of 1, at which log((1 - sigma) / sigma) has no value; diffusers does the same."""


def unipc(sigmas: Float[Tensor, " nodes"], order: int = 2) -> SolverSchedule:
    """UniPC (Zhao et al. 2023, arXiv 2302.04867) on a velocity: data prediction, B(h) = e^h - 1; Wan's own sampler.

    Every node i has a predicted state, at which the network is called, and a corrected one, y[i], which the next
    prediction starts from.  With the clean predictions m[k] = x[k] - sigma[k] f[k] and s = sigma[i+1] / sigma[i],

        x[i+1] = s y[i] + (1 - s) blend of m[i], m[i-1], ..            predictor, ``order`` outputs
        y[i+1] = s y[i] + (1 - s) blend of m[i+1], m[i], m[i-1], ..    corrector, once f[i+1] is known

    The chain's x[i] is the predicted state.  To eliminate y, the sampler is run on coefficients.  Every state is
    written as x[0] + sum over k of row[k] f[k]; x[0] has factor 1 because the weights of each blend sum to 1.  f[k] is
    row k of the identity, and b[i] = row of x[i+1] - row of x[i].  So a[i] = 1, b[i] reaches back to f[0]; a rollout
    must keep every output that a later step uses.  In return, plans and the adjoint know one kind of state.

    The order is lower in the first ``order`` - 1 steps and in the last steps (the very last is Euler's).
    sigmas: (N + 1,), strictly descending from at most 1 to at least 0; PrflError otherwise.
    """
    sigmas = sigmas.double().cpu()
    if not (sigmas.diff() < 0).all() or sigmas[0] > 1 or sigmas[-1] < 0:
        raise PrflError(f"UniPC with sigmas {sigmas.tolist()}", fix="let them descend strictly, from 1 at most")
    steps = len(sigmas) - 1
    levels = sigmas.clamp(max=NEARLY_ONE)
    log_snr = ((1 - levels) / levels).log()
    outputs = torch.eye(steps, dtype=torch.float64)
    predicted, clean = [torch.zeros(steps, dtype=torch.float64)], list[Tensor]()
    corrected = predicted[0]
    used = 0  # order of the step that led to node i
    for i in range(steps):
        clean.append(predicted[i] - levels[i] * outputs[i])
        if i > 0:
            s = levels[i] / levels[i - 1]
            others = [*range(i - 2, i - 1 - used, -1), i]
            corrected = s * corrected + (1 - s) * _blend(log_snr, clean, i - 1, others)
        used = min(order, i + 1, steps - i)
        s = levels[i + 1] / levels[i]
        others = [*range(i - 1, i - used, -1)]
        predicted.append(s * corrected + (1 - s) * _blend(log_snr, clean, i, others))
    rows = torch.stack(predicted).diff(dim=0).tolist()
    b = tuple({k: factor for k, factor in enumerate(row) if factor} for row in rows)
    return SolverSchedule(sigmas, a=(1.0,) * steps, b=b, c=(0.0,) * steps)


def _blend(log_snr: Float[Tensor, " nodes"], clean: Sequence[Tensor], i: int, others: Sequence[int]) -> Tensor:
    """Return the clean prediction for the whole step i -> i + 1, made of m[i] and its differences to ``others``.

        m[i] + sum over j of rho[j] (m[j] - m[i]) / r[j]        r[j] = (log_snr[j] - log_snr[i]) / h

    rho solves sum over j of rho[j] r[j]^(q-1) = q! z phi[q+1](z) / (e^z - 1) for q = 1 .. its length, with z = -h and
    phi[q+1](z) = (phi[q](z) - 1/q!) / z, phi[1](z) = (e^z - 1) / z.  A single rho is 1/2 (the paper's simplification).
    """
    if not others:
        return clean[i]
    h = log_snr[i + 1] - log_snr[i]
    ratios = (log_snr[list(others)] - log_snr[i]) / h
    rho = torch.full((1,), 0.5, dtype=torch.float64)
    if len(others) > 1:
        phi, moments = torch.expm1(-h) / -h, list[Tensor]()
        for q in range(1, len(others) + 1):
            phi = (phi - 1 / math.factorial(q)) / -h
            moments.append(math.factorial(q) * -h * phi / torch.expm1(-h))
        powers = torch.stack([ratios**q for q in range(len(others))])
        rho = torch.linalg.solve(powers, torch.stack(moments))
    differences = torch.stack([clean[j] - clean[i] for j in others])
    return clean[i] + (rho / ratios) @ differences


def flow_sde(sigmas: Float[Tensor, " nodes"], eta: float) -> SolverSchedule:
    """The stochastic step of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) on a rectified flow.

    The flow dx = v dsigma has the marginals p of every SDE dx = (v - g^2/2 grad log p) dsigma + g dw, run from noise
    (dsigma < 0).  On x = (1 - sigma) x0 + sigma noise the velocity gives the score: the expected noise is
    x + (1 - sigma) v, so that grad log p = -(x + (1 - sigma) v) / sigma.  An Euler-Maruyama step of d < 0,

        x[i+1] = x + (v + g^2 / (2 sigma) (x + (1 - sigma) v)) d + g sqrt(-d) noise,    g^2 = eta^2 sigma / (1 - sigma)

    is linear in x and v.  As the steps shrink, its marginals approach the flow's.  At sigma 1, where 1 - sigma is 0,
    g takes 1 - sigma of the next node, as in Flow-GRPO.  Unlike Flow-GRPO, a step to sigma 0 is Euler's, because its
    noise would stay in the video.
    eta: 0 is Euler, Flow-GRPO has 0.7.  Raises PrflError outside 0 to 1; above 1 the first steps overshoot.
    """
    if not 0 <= eta <= 1:
        raise PrflError(f"flow SDE with eta = {eta}", fix="choose eta from 0 (Euler) to 1")
    sigmas = sigmas.double().cpu()
    levels = sigmas.tolist()
    a, b, c = [], [], []
    for i, (now, after) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        change = after - now
        g_squared = eta**2 * now / (1 - (after if now == 1 else now)) if after > 0 else 0.0
        pull = g_squared / (2 * now)
        a.append(1 + pull * change)
        b.append({i: (1 + pull * (1 - now)) * change})
        c.append(math.sqrt(-g_squared * change))
    return SolverSchedule(sigmas, tuple(a), tuple(b), tuple(c))


def ancestral(sigmas: Float[Tensor, " nodes"], eta: float) -> SolverSchedule:
    """DDIM's step with noise (Song et al. 2021, equation 12; ancestral sampling) on a rectified flow.

    With the predictions x0 = x - sigma v and noise e = x + (1 - sigma) v, and s, s' the sigmas before and after a step,

        x[i+1] = (1 - s') x0 + sqrt(s'^2 - u^2) e + u noise        u = eta s' sqrt(1 - (s' (1 - s) / (s (1 - s')))^2)

    eta = 0 is Euler.  At eta = 1, x[i+1] given x[i] is distributed as noising x0 would have it: a step adds only noise
    that it took away, so that long steps leave none of it in the video.  Raises PrflError for eta outside 0 to 1.
    """
    if not 0 <= eta <= 1:
        raise PrflError(f"ancestral steps with eta = {eta}", fix="choose eta from 0 (Euler) to 1")
    sigmas = sigmas.double().cpu()
    levels = sigmas.tolist()
    a, b, c = [], [], []
    for i, (now, after) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        share = after * (1 - now) / (now * (1 - after)) if after < 1 else 1.0
        fresh = eta * after * math.sqrt(max(1 - share**2, 0.0))
        remaining = math.sqrt(max(after**2 - fresh**2, 0.0))
        a.append(1 - after + remaining)
        b.append({i: -(1 - after) * now + remaining * (1 - now)})
        c.append(fresh)
    return SolverSchedule(sigmas, tuple(a), tuple(b), tuple(c))


SOLVERS: dict[str, Callable[..., SolverSchedule]] = {
    "euler": euler,
    "unipc": unipc,
    "ancestral": ancestral,
    "flow_sde": flow_sde,
}
"""The solvers of a velocity, by their names in a config.  config/sections/rollout.py describes them to users."""


def ddim(alphas_cumprod: Float[Tensor, " nodes"], eta: float = 0.0) -> SolverSchedule:
    """DDIM (Song et al. 2021, equation 12) on a network that predicts the noise, epsilon.

        s = eta sqrt((1 - A') / (1 - A)) sqrt(1 - A / A')         A = alphas_cumprod[i], A' = alphas_cumprod[i+1]
        x[i+1] = sqrt(A' / A) x[i] + (sqrt(1 - A' - s^2) - sqrt(A' (1 - A) / A)) eps[i] + s noise[i]

    alphas_cumprod: (N + 1,), ascending to the clean end; the network gets sigma = sqrt(1 - alphas_cumprod).
    eta: 0 is deterministic, 1 has DDPM's noise.  Raises PrflError outside 0 to 1.
    """
    if not 0 <= eta <= 1:
        raise PrflError(f"DDIM with eta = {eta}", fix="choose eta from 0 (deterministic) to 1 (DDPM's noise)")
    signal = alphas_cumprod.double().cpu().tolist()
    a, b, c = [], [], []
    for i, (now, after) in enumerate(zip(signal[:-1], signal[1:], strict=True)):
        noise = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        # On the last step at eta = 1 the radicand is 0, which rounding may turn negative.
        direction = math.sqrt(max(1 - after - noise**2, 0.0))
        a.append(math.sqrt(after / now))
        b.append({i: direction - math.sqrt(after * (1 - now) / now)})
        c.append(noise)
    sigmas = (1 - torch.tensor(signal, dtype=torch.float64)).sqrt()
    return SolverSchedule(sigmas, tuple(a), tuple(b), tuple(c), prediction="epsilon")


def leap(schedule: SolverSchedule, source: int, sigma: float) -> tuple[float, float]:
    """Return (a, b) of one deterministic step to any ``sigma``: x' = a x[source] + b f[source].

    At sigma 0 this is the clean prediction.

    velocity: a = 1, b = sigma - sigma[source].
    epsilon: a = alpha / alpha[source], b = sigma - a sigma[source], with alpha = sqrt(1 - sigma^2).
    """
    start = float(schedule.sigmas[source])
    if schedule.prediction == "velocity":
        return 1.0, sigma - start
    a = math.sqrt((1 - sigma**2) / (1 - start**2))
    return a, sigma - a * start


def renoised(
    schedule: SolverSchedule, node: int, clean: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return clean latents noised to the sigma of ``node``, in the convention of ``schedule.prediction``."""
    sigma = float(schedule.sigmas[node])
    signal = 1 - sigma if schedule.prediction == "velocity" else math.sqrt(1 - sigma**2)
    return signal * clean + sigma * noise


def combine(
    latents: Float[Tensor, "*shape"],
    a: float,
    b: Mapping[Evaluation, float],
    outputs: Mapping[Evaluation, Tensor],
    c: float = 0.0,
    noise: Tensor | None = None,
) -> Float[Tensor, "*shape"]:
    """Return a x + sum over k of b[k] f[k] + c noise, in the dtype of the latents."""
    result = latents if a == 1 else a * latents
    for k, factor in b.items():
        result = torch.add(result, outputs[k], alpha=factor)
    if c != 0:
        assert noise is not None, f"a step with c = {c} needs its noise"
        result = torch.add(result, noise, alpha=c)
    return result.to(latents.dtype)


def unit_step_weight(schedule: SolverSchedule) -> dict[int, float]:
    """Return factors that make every step's parameter gradient weigh alike: mean |B| / |B[i]|, with B[i] = b[i][i].

    Under a shift |B| varies many-fold along the chain, so without them early steps weigh little.
    B[i] is the factor of f[i] in its own step, which is what a seed at x[i+1] sees; a multistep solver's later terms in
    f[i] do not count.  A step without a term in its own output has no such gradient, and is left out of the result and
    of the mean.
    """
    sizes = {i: abs(factors[i]) for i, factors in enumerate(schedule.b) if factors.get(i)}
    mean = sum(sizes.values()) / max(len(sizes), 1)
    return {i: mean / size for i, size in sizes.items()}
