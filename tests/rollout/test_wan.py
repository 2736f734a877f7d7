"""The two-phase walk on real Wan blocks, with policy and reward adapters on one network.

Wan computes partly in float32 whatever it is given, so this compares relative errors rather than float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prfl.backbone import Backbone, LoraSpec
from prfl.rollout import adjoint
from prfl.rollout.adjoint import retain_graph
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.guidance import guided_network
from prfl.rollout.plan import Plan, full_chain, one_step
from prfl.rollout.solvers import euler
from prfl.rollout.trajectory import rollout

CHAIN = euler(chain_sigmas(3, 3.0))


@pytest.fixture
def backbone(tiny_backbone: Backbone) -> Backbone:
    """Both adapters act: their B starts at 0, which would hide a mix-up."""
    torch.manual_seed(0)
    for name in ("policy", "reward"):
        tiny_backbone.add_adapter(name, LoraSpec(rank=4, alpha=8, targets=["to_q", "to_v", "to_out.0"]))
        for parameter in tiny_backbone.parameters(name).values():
            parameter.data.normal_(std=0.2)
    return tiny_backbone


@pytest.fixture
def start() -> Tensor:
    return torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def reward(backbone: Backbone, latents: Tensor, node: int, condition) -> Tensor:
    with backbone.adapter("reward"):
        (hidden,) = backbone.features(latents, CHAIN.sigmas[node].float(), condition, [1])
    return torch.sin(hidden).square().sum(dim=(1, 2)).sum()


def conditions(backbone: Backbone):
    return backbone.condition(["a red circle moves left", "a blue square"]), backbone.condition(["", ""])


def joint_gradients(backbone: Backbone, start: Tensor, plan: Plan, nodes: list[int], **guidance) -> list[Tensor]:
    """Plain autograd through rollout and rewards in one graph (no checkpointing)."""
    condition, empty = conditions(backbone)
    network = guided_network(backbone.velocity, condition, empty, **guidance)
    x, states = start, [start]
    with backbone.adapter("policy"):
        for i in range(CHAIN.steps):
            with torch.set_grad_enabled(i in plan.trains):
                x = x + CHAIN.b[i][i] * network(x, CHAIN.sigmas[i].float())
            states.append(x)
    loss = torch.stack([reward(backbone, states[node], node, condition) for node in nodes]).sum()
    return list(torch.autograd.grad(loss, list(backbone.parameters("policy").values())))


def walked_gradients(
    backbone: Backbone, start: Tensor, plan: Plan, nodes: list[int], held: bool = False, **guidance
) -> list[Tensor]:
    condition, empty = conditions(backbone)
    network = guided_network(backbone.velocity, condition, empty, **guidance)
    parameters = list(backbone.parameters("policy").values())
    with backbone.adapter("policy"):
        trajectory = rollout(network, start, CHAIN)
        edge = retain_graph(network, trajectory, plan, parameters) if held else None
    seeds = {}
    for node in nodes:
        leaf = trajectory.at(node).detach().requires_grad_()
        with backbone.adapter("reward"):  # its backward too: checkpointing may compute its blocks again
            (seeds[node],) = torch.autograd.grad(reward(backbone, leaf, node, condition), leaf)
    with backbone.adapter("policy"):
        if edge is None:
            adjoint.backward(network, trajectory, plan, seeds, parameters)
        else:
            edge.backward(seeds[nodes[0]])
    assert all(parameter.grad is None for parameter in backbone.parameters("reward").values())
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def relative_error(got: list[Tensor], wanted: list[Tensor]) -> float:
    flat, reference = (torch.cat([g.flatten() for g in tensors]) for tensors in (got, wanted))
    return float((flat - reference).norm() / reference.norm())


ONE_PASS, BOTH = {"scale": 3.0, "gradient": "cond"}, {"scale": 3.0, "gradient": "both"}


@pytest.mark.parametrize(
    "guidance, checkpointing", [({}, "none"), (ONE_PASS, "attention"), (BOTH, "none"), (BOTH, "full")]
)
def test_full_chain_with_seeds_at_two_nodes(backbone, start, guidance, checkpointing):
    plan, nodes = full_chain(CHAIN), [1, 3]
    wanted = joint_gradients(backbone, start, plan, nodes, **guidance)
    backbone.running.checkpointing = checkpointing
    assert relative_error(walked_gradients(backbone, start, plan, nodes, **guidance), wanted) < 1e-5


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
@pytest.mark.parametrize("held", [False, True])
def test_one_step_walked_and_held(backbone, start, checkpointing, held):
    plan = one_step(CHAIN, 1)
    wanted = joint_gradients(backbone, start, plan, [2])
    backbone.running.checkpointing = checkpointing
    assert relative_error(walked_gradients(backbone, start, plan, [2], held), wanted) < 1e-5


def test_the_wrong_adapter_is_caught(backbone, start):
    """Walked under the reward's adapter, the policy's parameters are in no graph."""
    condition, _ = conditions(backbone)
    network = guided_network(backbone.velocity, condition)
    with backbone.adapter("policy"):
        trajectory = rollout(network, start, CHAIN)
    parameters = list(backbone.parameters("policy").values())
    with backbone.adapter("reward"), pytest.raises(ValueError, match="gives no gradient"):
        adjoint.backward(network, trajectory, one_step(CHAIN, 1), {2: torch.ones_like(start)}, parameters)


def test_a_reward_read_under_the_wrong_adapter_shows(backbone, start, monkeypatch):
    """The comparison above can fail: seeds from the policy's adapter give another gradient."""
    plan = one_step(CHAIN, 1)
    wanted = joint_gradients(backbone, start, plan, [2])
    right = backbone.adapter
    monkeypatch.setattr(backbone, "adapter", lambda name: right("policy"))
    assert relative_error(walked_gradients(backbone, start, plan, [2]), wanted) > 1e-2
