"""Tensors in host memory between a forward pass and its backward pass, copied there and back beside the computation.

On a GPU the host memory is pinned and the copies run on a stream of their own.  On a CPU the same code copies at once,
which saves nothing and is there to be tested.  On ``meta`` only shapes are kept, so that a count sees nothing there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

LEAVING = 2  # tensors whose copies to the host may still run while the forward pass goes on; each holds its memory


def streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
    """Return a GPU's streams (computing, copying); None for a CPU.

    One stream copies both ways: a copy back is queued behind the copy there.
    """
    return (torch.cuda.current_stream(device), _copying(device)) if device.type == "cuda" else None


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass(eq=False)
class Parked:
    """One tensor of a store.  coming: its copy on the device, and what says that it is complete."""

    group: int
    layout: tuple[torch.Size, tuple[int, ...], torch.dtype]
    device: torch.device
    host: Tensor | None = None  # none on meta
    coming: tuple[Tensor, torch.cuda.Event | None] | None = None
    taken: bool = False

    @property
    def bytes(self) -> int:
        size, _, dtype = self.layout
        return size.numel() * dtype.itemsize

    def __del__(self) -> None:
        """Wait for what was sent for and never taken (a failed backward pass): its memory may not be handed on yet."""
        if self.coming is not None and self.coming[1] is not None:
            streams(self.device)[0].wait_event(self.coming[1])  # type: ignore[index]


@dataclass(eq=False)
class HostStore:
    """Tensors of one forward pass, in groups that are needed together (a block's), taken back last group first.

    While a group is taken, the one before it is already on its way.  Host memory is held until the store is freed,
    with the graph that refers to it, so a tensor can be taken again.

    A tensor that leaves is held until the computing stream waits for its copy, and one that comes back is allocated on
    the computing stream and waited for there: the allocator may then hand the memory of either on in stream order.
    (With ``record_stream`` a host that runs ahead of its GPU finds every freed block still in use, and all of them
    live at once.)  The GPU path is **untested on a GPU** so far.
    """

    groups: list[list[Parked]] = field(default_factory=list)
    _leaving: deque[tuple[torch.cuda.Event, Tensor]] = field(default_factory=deque)

    @property
    def bytes(self) -> int:
        """Sum the host memory of all that is stored, in bytes."""
        return sum(parked.bytes for group in self.groups for parked in group)

    def new_group(self) -> None:
        self.groups.append([])

    @torch.no_grad()
    def put(self, tensor: Tensor) -> Parked:
        """Copy a tensor into the newest group.  Its device memory is free once nobody else refers to it.

        The layout is kept (attention gives its output transposed); no expanded tensors.
        """
        tensor = tensor.detach()
        layout = tensor.size(), tensor.stride(), tensor.dtype
        parked = Parked(len(self.groups) - 1, layout, tensor.device)
        self.groups[-1].append(parked)
        if tensor.is_meta:
            return parked

        pair = streams(tensor.device)
        parked.host = torch.empty_strided(*layout[:2], dtype=tensor.dtype, device="cpu", pin_memory=pair is not None)
        if pair is None:
            parked.host.copy_(tensor)
            return parked

        # On a GPU the copy waits for what computes the tensor, and the computation goes on.
        computing, copying = pair
        copying.wait_stream(computing)
        with torch.cuda.stream(copying):
            parked.host.copy_(tensor, non_blocking=True)
            self._leaving.append((copying.record_event(), tensor))
        self.settle(LEAVING)
        return parked

    def settle(self, leaving: int = 0) -> None:
        """Let go of all but the newest ``leaving`` tensors on their way to the host: the computing stream waits."""
        while len(self._leaving) > leaving:
            copied, tensor = self._leaving.popleft()
            streams(tensor.device)[0].wait_event(copied)  # type: ignore[index]

    @torch.no_grad()
    def take(self, parked: Parked) -> Tensor:
        """Return the tensor on its device again, and send for the group before it."""
        self.settle()
        _send_for(parked)
        for other in self.groups[parked.group - 1] if parked.group else []:
            if not other.taken:
                _send_for(other)

        assert parked.coming is not None
        (tensor, complete), parked.coming, parked.taken = parked.coming, None, True
        if complete is not None:
            streams(tensor.device)[0].wait_event(complete)  # type: ignore[index]
        return tensor


def _send_for(parked: Parked) -> None:
    """Start the copy of a tensor back to its device, once."""
    if parked.coming is not None:
        return

    size, stride, dtype = parked.layout
    tensor = torch.empty_strided(size, stride, dtype=dtype, device=parked.device)
    complete = None
    pair = streams(parked.device)
    if pair is not None:
        computing, copying = pair
        assert parked.host is not None
        copying.wait_stream(computing)  # until now the memory may have been another tensor's
        with torch.cuda.stream(copying):
            tensor.copy_(parked.host, non_blocking=True)
            complete = copying.record_event()
    elif parked.host is not None:
        tensor.copy_(parked.host)
    parked.coming = tensor, complete
