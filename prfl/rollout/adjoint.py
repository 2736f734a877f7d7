"""The adjoint: goes from the last edge to the first, and differentiates one recomputed network call at a time.

    cotangent of x[i]:  a[i] = r[i] + sum over edges i -> j of through A a[j] + beta[i] J_x f[i]^T g[i]
    cotangent of f[i]:  g[i] = sum over edges e that contain f[i] of b_e[i] a[target of e]
    parameters:         dL/dtheta = sum over i in S of step_weight[i] J_theta f[i]^T g[i]

Activation memory is that of one network call, however many steps there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prfl.rollout.plan import Clean, Edge, Evaluated, Node, Plan, order
from prfl.rollout.solvers import combine
from prfl.rollout.trajectory import Network, Trajectory
from prfl.utils.errors import PrflError

Key = TypeVar("Key", bound=Node)
OutputTerm = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents, sigma, output) of a trained evaluation -> the gradient of a further loss at that output."""


@dataclass(frozen=True)
class AdjointStats:
    """calls: the recomputed evaluations, in order.  cotangent_norm: of each node's cotangent, a scalar tensor."""

    calls: list[Evaluated]
    cotangent_norm: dict[Node, Float[Tensor, ""]]


def backward(
    network: Network,
    trajectory: Trajectory,
    plan: Plan,
    seeds: Mapping[Node, Float[Tensor, "*latents"]],
    parameters: Sequence[nn.Parameter],
    term: OutputTerm | None = None,
) -> AdjointStats:
    """Add dL/dtheta to ``.grad`` of ``parameters``; seeds: node -> dL/dx[node], shape and device of the latents.

    term: a further loss of the trained evaluations' outputs.  Its gradient reaches the parameters only, so none of
    these evaluations may pass a cotangent on to its latents.
    Each seed is the partial derivative at its own node, taken on detached latents.
    The rollout's adapter must still be selected.  Only ``parameters`` get a gradient.
    Raises PrflError for a seed that reaches no trained evaluation, and if the network gives no gradient.
    """
    useful = plan.useful_nodes
    _check_seeds(seeds, useful)
    edge_to = {edge.target: edge for edge in plan.edges}
    at_latents: dict[Node, Tensor] = dict(seeds)
    at_outputs: dict[Evaluated, Tensor] = {}
    stats = AdjointStats([], {})

    # Edges lead forward, so whatever flows into a node's output and latents has arrived when its turn comes.
    for node in sorted({*edge_to, *plan.evaluations}, key=order, reverse=True):
        if not isinstance(node, Clean) and node in at_outputs:
            needs_input = plan.passes(node, useful)
            cotangent = at_outputs.pop(node)
            pulled = _pull_back(network, trajectory, plan, node, cotangent, parameters, needs_input, term)
            stats.calls.append(node)
            if pulled is not None:
                _add(at_latents, node, pulled)
        if node in at_latents:
            cotangent = at_latents.pop(node)
            stats.cotangent_norm[node] = cotangent.norm()
            _spread(cotangent, edge_to[node], plan, useful, at_latents, at_outputs)
    return stats


def _check_seeds(seeds: Mapping[Node, Tensor], useful: frozenset[Node]) -> None:
    idle = sorted(set(seeds) - useful, key=order)
    if idle or not seeds:
        raise PrflError(
            f"seeds at nodes {idle} reach no trained network evaluation" if idle else "a walk without seeds",
            fix=f"put them at nodes among {sorted(useful, key=order)}, or train an earlier step",
        )


def _spread(
    cotangent: Float[Tensor, "*latents"],
    edge: Edge,
    plan: Plan,
    useful: frozenset[Node],
    at_latents: dict[Node, Tensor],
    at_outputs: dict[Evaluated, Tensor],
) -> None:
    """Add a cotangent a along one edge: A a to its source, b[k] a to its outputs, if they lead to a parameter."""
    if edge.through and edge.source in useful:
        _add(at_latents, edge.source, edge.through * edge.a * cotangent)
    for k, factor in edge.b.items():
        if k in plan.trains or plan.passes(k, useful):
            _add(at_outputs, k, factor * cotangent)


def _add(sums: dict[Key, Tensor], key: Key, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value  # never in place: the first may be the caller's seed


def _pull_back(
    network: Network,
    trajectory: Trajectory,
    plan: Plan,
    k: Evaluated,
    cotangent: Float[Tensor, "*latents"],
    parameters: Sequence[nn.Parameter],
    needs_input: bool,
    term: OutputTerm | None = None,
) -> Float[Tensor, "*latents"] | None:
    """Recompute f[k], add step_weight J_theta^T g to the parameters, and return beta J_x^T g if it is needed."""
    x = trajectory.at(k).detach().requires_grad_(needs_input)
    sigma = trajectory.sigma(k, x)
    with torch.enable_grad():
        output = network(x, sigma)

    # An evaluation that is not trained only hands the cotangent on.
    if k not in plan.trains:
        (gradient,) = torch.autograd.grad(output, x, cotangent.to(output.dtype))
        return plan.beta[k] * gradient.to(cotangent.dtype)

    # One backward pass of weight * g gives both gradients; the cotangent of x must not keep the weight.
    weight = plan.step_weight.get(k, 1.0)
    weighted = weight * cotangent
    if term:
        assert not needs_input, f"the gradient of a term of output {k} would go on to its latents"
        weighted = weighted + term(x, sigma, output.detach())
    _backward(k, output, weighted, parameters, [x] if needs_input else [])
    if not needs_input:
        return None
    assert x.grad is not None, f"network evaluation {k} does not depend on its latents"
    return plan.beta[k] / weight * x.grad.to(cotangent.dtype)


def _backward(
    k: Evaluated,
    output: Float[Tensor, "*latents"],
    cotangent: Float[Tensor, "*latents"],
    parameters: Sequence[nn.Parameter],
    extra: Sequence[Tensor] = (),
) -> None:
    """Accumulate J^T g into .grad of the parameters and of ``extra``; raise if no parameter received any."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    received: list[Tensor] = []

    # Hooks tell which parameters get gradient now; .grad may hold that of an earlier call.
    hooks = [parameter.register_post_accumulate_grad_hook(received.append) for parameter in trainable]
    if trainable and output.requires_grad:
        torch.autograd.backward(output, cotangent.to(output.dtype), inputs=[*extra, *trainable])
    for hook in hooks:
        hook.remove()

    if not received:
        raise PrflError(
            f"a gradient mode whose network gives no gradient: step {k} is to be trained, but none of the "
            f"{len(parameters)} parameters ({len(trainable)} of them require gradient) is in its graph",
            fix="select the adapter that is trained around rollout and walk, and give its parameters",
        )


@dataclass(eq=False)
class RetainedGraph:
    """The kept graph of a plan with one edge: ``latents`` (detached) are scored, then ``backward`` takes the seed.

    source: the latents and the sigma at which the output was computed.
    """

    latents: Float[Tensor, "*latents"]
    source: tuple[Float[Tensor, "*latents"], Float[Tensor, ""]]
    plan: Plan
    parameters: Sequence[nn.Parameter]
    output: Float[Tensor, "*latents"] | None

    def backward(self, seed: Float[Tensor, "*latents"], term: OutputTerm | None = None) -> AdjointStats:
        """Add dL/dtheta = step_weight b J_theta f^T seed to ``.grad`` of the parameters and free the graph.

        term: see ``adjoint.backward``.
        """
        assert self.output is not None, "backward was called twice"
        (edge,), (k,) = self.plan.edges, self.plan.trains
        cotangent = self.plan.step_weight.get(k, 1.0) * edge.b[k] * seed
        if term:
            cotangent = cotangent + term(*self.source, self.output.detach())
        _backward(k, self.output, cotangent, self.parameters)
        self.output = None
        return AdjointStats([k], {edge.target: seed.norm()})


def retain_graph(
    network: Network, trajectory: Trajectory, plan: Plan, parameters: Sequence[nn.Parameter]
) -> RetainedGraph:
    """Run the only edge of a plan with autograd and keep its graph, which saves the adjoint's second forward pass.

    Use it with checkpointed blocks, whose graph is small: it is in memory together with the reward's.
    """
    (edge,), (k,) = plan.edges, plan.trains
    x = trajectory.at(k)
    sigma = trajectory.sigma(k, x)
    with torch.enable_grad():
        output = network(x, sigma)
    latents = _target(network, trajectory, edge, {k: output.detach()})
    return RetainedGraph(latents, (x, sigma), plan, parameters, output)


def target_latents(network: Network, trajectory: Trajectory, edge: Edge) -> Float[Tensor, "*latents"]:
    """Return a x[source] + sum b[k] f[k] + c noise: the latents at an edge's end, computed without autograd.

    This is for nodes that the chain does not visit, such as a clean prediction.
    """
    return _target(network, trajectory, edge, {})


@torch.no_grad()
def _target(
    network: Network, trajectory: Trajectory, edge: Edge, outputs: Mapping[Evaluated, Tensor]
) -> Float[Tensor, "*latents"]:
    all_outputs: dict[Evaluated, Tensor] = {**trajectory.outputs, **outputs}
    for k in edge.b:
        if k not in all_outputs:
            x = trajectory.at(k)
            all_outputs[k] = network(x, trajectory.sigma(k, x))
    x = trajectory.at(edge.source)
    noise = None
    if edge.c and trajectory.noises is not None:
        assert isinstance(edge.source, int), f"a step with noise starts on the chain: {edge}"
        noise = trajectory.noises[edge.source].to(x.device)
    return combine(x, edge.a, edge.b, all_outputs, edge.c, noise)
