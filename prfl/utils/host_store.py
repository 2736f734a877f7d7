"""Keep tensors in host memory between a forward pass and its backward pass; copies overlap with the computation.

On a GPU the host memory is pinned and the copies run on a separate stream.  On a CPU the same code copies at once: this
saves nothing and exists for tests.  On ``meta`` only shapes are kept, so that memory counts see no host tensors.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

LEAVING = 2  # how many tensors may still be copied to the host while the forward pass goes on; each keeps its memory


def streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
    """Return a GPU's streams (computing, copying); None for a CPU.

    One stream copies in both directions, so a copy back to the GPU is queued after the copy to the host.
    """
    return (torch.cuda.current_stream(device), _copying(device)) if device.type == "cuda" else None


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass(eq=False)
class Parked:
    """One tensor of a store.  coming: its copy on the device and the event of its completion; None if not sent for."""

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
        """Wait for a copy that was started and never taken (a failed backward pass), before its memory is reused."""
        if self.coming is not None and self.coming[1] is not None:
            streams(self.device)[0].wait_event(self.coming[1])  # type: ignore[index]


@dataclass(eq=False)
class HostStore:
    """Tensors of one forward pass, in groups that are needed together (a block's); the last group is taken first.

    While a group is taken, the group before it is already being copied back.  Host memory is kept until the store is
    freed, together with the graph that refers to it, so a tensor can be taken more than once.

    A tensor on its way to the host is kept until the computing stream has been made to wait for its copy.  A tensor
    that comes back is allocated on the computing stream, which waits for the copy.  So the allocator can reuse the
    memory of both in stream order.  (With ``record_stream``, if the host runs ahead of the GPU, every freed block still
    counts as in use, and all of them are alive at once.)  The GPU path is **untested on a GPU** so far.
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
        """Copy a tensor into the newest group.  Its device memory is freed once nothing else refers to it.

        Strides are kept, because attention returns transposed tensors.  Expanded tensors are not supported.
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
        """Make the computing stream wait for all copies to the host but the newest ``leaving``; free their tensors."""
        while len(self._leaving) > leaving:
            copied, tensor = self._leaving.popleft()
            streams(tensor.device)[0].wait_event(copied)  # type: ignore[index]

    @torch.no_grad()
    def take(self, parked: Parked) -> Tensor:
        """Return the tensor on its device, and start to copy the group before it back."""
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
        copying.wait_stream(computing)  # the computing stream may still use this memory for another tensor
        with torch.cuda.stream(copying):
            tensor.copy_(parked.host, non_blocking=True)
            complete = copying.record_event()
    elif parked.host is not None:
        tensor.copy_(parked.host)
    parked.coming = tensor, complete
