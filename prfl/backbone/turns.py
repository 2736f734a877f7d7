"""Networks of one layout whose blocks' frozen weights take turns on the device, where those of one are at a time.

They have a copy in host memory, pinned beside a GPU, that is only ever read: a swap copies it into the buffers that all
networks share, and nothing comes back, since nothing has changed.  Adapters stay on the device; so does what lies
outside the blocks, which is small, and which no checkpoint computes again.

A graph that was made before a swap refers to weights that are gone.  Their version is raised, so that autograd refuses
such a graph; what a checkpointed block needs is brought when it is computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

CHUNK, ALIGNED = 2**30, 256


def chunks(sizes: Iterable[int]) -> list[list[int]]:
    """Numbers of tensors of these sizes that are allocated together: torch takes pinned memory in powers of two, and a
    weight by itself would take up to twice its size."""
    groups: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if size > room or not groups:
            groups.append([])
            room = CHUNK
        groups[-1].append(number)
        room -= aligned(size)
    return groups


def aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def on_the_host(parameters: Mapping[str, nn.Parameter], pin: bool) -> dict[str, Tensor]:
    """Move these weights into host memory, which they share in large pieces, and return them."""
    kept: dict[str, Tensor] = {}
    names, sizes = list(parameters), [p.numel() * p.element_size() for p in parameters.values()]
    for group in chunks(sizes):
        piece = torch.empty(sum(aligned(sizes[number]) for number in group), dtype=torch.uint8, pin_memory=pin)
        start = 0
        for number in group:
            parameter = parameters[names[number]]
            on_host = piece[start : start + sizes[number]].view(parameter.dtype).view(parameter.shape)
            parameter.data = kept[names[number]] = on_host.copy_(parameter.detach())
            start += aligned(sizes[number])
    return kept


def weights_of(blocks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """The weights of blocks that take turns, by number and name: all but adapters."""
    every = [(f"{number}.{key}", p) for number, block in enumerate(blocks) for key, p in block.named_parameters()]
    return {key: parameter for key, parameter in every if ".lora_" not in key}


class Turns:
    """networks: by name, with their weights on the host.  blocks: of each, whose weights take turns; a block that runs
    brings those of its network.  ``swaps`` counts."""

    def __init__(
        self, networks: Mapping[str, nn.Module], blocks: Mapping[str, Sequence[nn.Module]], device: torch.device
    ) -> None:
        self.device, self.swaps = device, 0
        self.current: str | None = None
        self.weights = {name: weights_of(part) for name, part in blocks.items()}
        self.host = {name: on_the_host(part, pin=device.type == "cuda") for name, part in self.weights.items()}
        self.shared: dict[str, Tensor] = {}
        self.network_of = {id(block): name for name, part in blocks.items() for block in part}
        for name, network in networks.items():
            self.return_others(network)
            for block in blocks[name]:
                block.register_forward_pre_hook(lambda block, _: self.bring_for(block))

    def bring(self, name: str) -> None:
        """Have this network's weights on the device."""
        if self.current == name:
            return
        self.leave()
        for key, host in self.host[name].items():
            if key not in self.shared:
                self.shared[key] = torch.empty_like(host, device=self.device)
            self.shared[key].copy_(host, non_blocking=True)
            self.weights[name][key].data = self.shared[key]
        self.current = name
        self.swaps += 1

    def bring_for(self, block: nn.Module) -> None:
        """Have the weights of this block's network on the device."""
        self.bring(self.network_of[id(block)])

    def leave(self) -> None:
        """All weights are those of the host."""
        if self.current is None:
            return
        gone = self.weights[self.current]
        for key, parameter in gone.items():
            parameter.data = self.host[self.current][key]
        torch.autograd.graph.increment_version(list(gone.values()))
        self.current = None

    def return_others(self, network: nn.Module) -> None:
        """Bring to the device what does not take turns: adapters, and what lies outside the blocks."""
        waiting = {id(parameter) for part in self.weights.values() for parameter in part.values()}
        for tensor in (*network.parameters(), *network.buffers()):
            if id(tensor) not in waiting:
                tensor.data = tensor.data.to(self.device)

    def free(self) -> None:
        """Free the device's memory; the next ``bring`` takes it again."""
        self.leave()
        self.shared.clear()
