"""Features and checkpointing of any diffusers network that runs lists of blocks, without a copy of its loop.

Features come from forward hooks; behind the last block that is wanted an exception ends the call.  Checkpointing is
put around a block's forward by its class, as the kernels are: names, parameters and saved files stay what they were.
A function on the instance would not do: ``deepcopy`` takes it along as it is, and a trained copy's blocks would compute
with the base's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prfl.backbone.adapters import same_adapter_only
from prfl.backbone.checkpointing import Running, run_block
from prfl.utils.errors import PrflError
from prfl.utils.host_store import HostStore


def first_tensor(output: Any) -> Tensor:
    """The video's tokens of what a block returns: itself, or the first of (video, text)."""
    return output[0] if isinstance(output, tuple) else output


class _Enough(Exception):
    """The last block that is wanted has run."""


def hidden_states(
    call: Callable[[], Any],
    blocks: Sequence[nn.Module],
    wanted: Sequence[int],
    tokens: Callable[[Any], Tensor] = first_tensor,
) -> list[Tensor]:
    """The tokens behind each wanted block (0 is the first), in that order; later blocks are never run.

    call: runs the network.  blocks: all of its blocks, in the order in which they run.  tokens: of a block's output,
    those of the video.  Raises PrflError for a block that does not exist.
    """
    if not wanted or not set(wanted) <= set(range(len(blocks))):
        raise PrflError(f"features after blocks {list(wanted)}", fix=f"choose among 0 to {len(blocks) - 1}")
    states: dict[int, Tensor] = {}
    last = max(wanted)

    def keep(index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        states[index] = tokens(output)
        if index == last:
            raise _Enough

    hooks = [blocks[index].register_forward_hook(partial(keep, index)) for index in set(wanted)]
    try:
        call()
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [states[index] for index in wanted]


class Checkpointed(nn.Module):
    """Put before a block's own class: the block is computed again in the backward pass, as ``running`` says."""

    running: Running  # of the class, so that a copy of the network is run as the network is
    position: int
    attends: bool  # else there is no attention to keep

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mode = self.running.modes(self.position + 1, velocity=not self.running.features)[-1]
        mode = "full" if mode == "attention" and not self.attends else mode
        if mode == "none" or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        names = list(kwargs)

        def run(*values: Any) -> Any:
            if self.running.turns is not None:  # when it is computed again, no hook runs
                self.running.turns.bring_for(self)
            positional = len(values) - len(names)
            named = dict(zip(names, values[positional:], strict=True))
            return super(Checkpointed, self).forward(*values[:positional], **named)

        store = HostStore() if self.running.offload else None
        output = run_block(same_adapter_only(self, run), *args, *kwargs.values(), mode=mode, store=store)
        if store is not None:
            store.settle()
        return output


def checkpoint_blocks(blocks: Sequence[nn.Module], running: Running) -> None:
    """Let these blocks, in the order in which they run, do as ``running`` says at each call."""
    classes: dict[type, type] = {}
    for position, block in enumerate(blocks):
        plain = type(block)
        # Of the same name: diffusers compiles blocks by it.
        made_of = (Checkpointed, plain)
        block.__class__ = classes.setdefault(plain, type(plain.__name__, made_of, {"running": running}))
        block.position = position
        block.attends = any(hasattr(module, "set_processor") for module in block.modules())
