"""Guidance by the reward's gradient, in the velocity itself, so that one formula serves every solver.

    v' = v - t / (1 - t) strength grad r(x, t)        t = sigma

For r the soft value this is exactly the velocity of the distribution tilted by exp(strength r).  In an SDE with noise s
it gives the drift c(t) strength grad r, c(t) = t / (1 - t) + s^2 / 2: as much as the ODE and all SDEs need (Euphonium's
drift, arXiv 2602.04928, has such a term).  A learned r does not flatten near t = 1, where the factor has no bound, so t
is taken as ``latest`` at most; and no push is longer than ``longest`` times the velocity of its sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prfl.backbone.condition import Condition
from prfl.rollout.flow import clean_prediction
from prfl.steering.calls import BACKWARD, Calls
from prfl.steering.chains import Steered
from prfl.steering.process import Process, Read


@dataclass(frozen=True)
class GuidedSampling:
    """chains: of a video, each guided, of which the best ``keep`` by the last scores are kept.

    from_step, to_step: shares of the steps between which the gradient acts.
    """

    chains: int = 1
    keep: int = 1
    strength: float = 1.0
    latest: float = 0.95
    longest: float = 1.0
    from_step: float = 0.0
    to_step: float = 1.0

    def __call__(self, process: Process) -> Steered:
        guided = replace(process)
        guided.network = self.bent(guided, process.network)
        chains = guided.look(guided.step_to(guided.start(self.chains), guided.steps))
        return guided.finish(guided.keep_best(chains, self.keep))

    def bent(self, process: Process, network: Read) -> Read:
        """The network with the push in it; ``process`` counts what that costs."""
        sigmas, steps = process.schedule.sigmas.tolist(), process.steps
        nodes = range(round(self.from_step * steps), round(self.to_step * steps))
        acting = {round(sigmas[node], 6) for node in nodes} if self.strength else set()

        def bent(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            if round(float(sigma), 6) not in acting:
                return network(latents, sigma, condition)
            velocity, slope = with_gradient(process, network, latents, sigma, condition)
            velocity = network(latents, sigma, condition) if velocity is None else velocity
            process.calls += gradient_price(process, sigma) * len(latents)
            at = min(float(sigma), self.latest)
            return velocity - shortened(at / (1 - at) * self.strength * slope, self.longest, velocity)

        return bent


def gradient_price(process: Process, sigma: Tensor) -> Calls:
    """What the gradient of one sample costs at a noise level, beside the network call that there is anyway."""
    both, price = 1 + BACKWARD, Calls()
    for look in process.looks:
        price += Calls(reward=look.calls * both, decodes=look.decodes * process.prices.decode * both)
    return price + Calls(policy=BACKWARD * process.prices.at(sigma) * any(look.clean for look in process.looks))


def with_gradient(
    process: Process, network: Read, latents: Tensor, sigma: Tensor, condition: Condition
) -> tuple[Tensor | None, Tensor]:
    """The velocity, where a look needs it, and the gradient of the weighted looks in the latents.

    Looks at clean predictions are differentiated through the network; every backward pass is under the adapter of its
    forward pass.
    """
    leaf, gradient = latents.detach().requires_grad_(), torch.zeros_like(latents)
    for look in process.looks:
        if not look.clean:
            with torch.enable_grad(), look.held():
                gradient += look.weight * torch.autograd.grad(look.read(leaf, sigma, condition).sum(), leaf)[0]
    clean_looks = [look for look in process.looks if look.clean]
    if not clean_looks:
        return None, gradient
    with torch.enable_grad(), process.held():
        velocity = network(leaf, sigma, condition)
        clean, level = clean_prediction(leaf, velocity, sigma), torch.zeros_like(sigma)
        total = torch.stack([look.weight * look.read(clean, level, condition).sum() for look in clean_looks]).sum()
        gradient += torch.autograd.grad(total, leaf)[0]
    return velocity.detach(), gradient


def shortened(push: Tensor, longest: float, velocity: Tensor) -> Tensor:
    """The push, of each sample at most ``longest`` times as long as its velocity."""
    lengths, limits = push.flatten(1).norm(dim=1), longest * velocity.flatten(1).norm(dim=1)
    factors = (limits / lengths.clamp(min=torch.finfo(push.dtype).tiny)).clamp(max=1.0)
    return push * factors.reshape(-1, *[1] * (push.ndim - 1))
