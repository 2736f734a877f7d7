"""``backbone.checkpointing: auto``: keep of the blocks what the card has room for, so that less is computed again.

By how many seconds a byte saves, the attention's output comes first: it is most of the work of a long video and one
hidden state.  Then whole blocks.  Each kind is raised for the trained network's blocks and then for the reward's, as
far as the predicted peak of the training leaves room.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from prfl.backbone import Backbone
from prfl.backbone.checkpointing import Checkpointing
from prfl.config.schema import Config
from prfl.estimate.memory import RunOnMeta
from prfl.estimate.units import gib
from prfl.factory.backbone import build_architecture, device_kind
from prfl.factory.reward import Reward
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.latent import LatentReward

SHARE = 0.9  # of the card: workspaces, the CUDA context and the allocator's gaps are in no prediction


@dataclass(frozen=True)
class Filled:
    """Numbers of blocks whose attention output, or whole graph, is kept: of the trained network, and of the reward's.

    peak: bytes, predicted.  room: bytes that there were.
    """

    attention: int = 0
    whole: int = 0
    reward_attention: int = 0
    reward_whole: int = 0
    blocks: int = 0
    reward_blocks: int = 0
    peak: int = 0
    room: int = 0

    def modes(self) -> tuple[Checkpointing, ...]:
        return _modes(self.blocks, self.attention, self.whole)

    def reward_modes(self) -> tuple[Checkpointing, ...]:
        return _modes(self.reward_blocks, self.reward_attention, self.reward_whole)

    def put_into(self, model: Backbone) -> None:
        model.running.checkpointing = "full"
        model.running.block_modes, model.running.feature_modes = self.modes(), self.reward_modes()

    def __str__(self) -> str:
        more, of_reward = self.attention - self.whole, self.reward_attention - self.reward_whole
        policy = f"of {self.blocks} blocks {max(0, self.whole)} are kept whole and the attention of {max(0, more)} more"
        reward = f"of the reward's {self.reward_blocks}, {self.reward_whole} and {max(0, of_reward)}"
        return f"{policy}; {reward}; {gib(self.peak)} predicted, {gib(self.room)} there"


def _modes(count: int, attention: int, whole: int) -> tuple[Checkpointing, ...]:
    """Return the checkpointing of each block.

    The late ones keep the most, since the backward pass frees them first; but the very last comes last, since the
    network's head, which keeps float32 copies, is computed again with it.
    """
    modes: list[Checkpointing] = ["full"] * count
    order = [*range(count - 2, -1, -1), count - 1][:count]
    for number, block in enumerate(order):
        modes[block] = "none" if number < whole else "attention" if number < attention else "full"
    return tuple(modes)


def room(config: Config) -> int | None:
    """Return the bytes that a run may take of this machine's card; None where the card is elsewhere."""
    if device_kind(config) != "cuda" or not torch.cuda.is_available():
        return None
    return int(SHARE * torch.cuda.get_device_properties(0).total_memory)


def fill_card(config: Config, model: Backbone) -> str:
    """Have ``model`` keep what this machine's card has room for; returns what was chosen, in words.

    Processes with cards of different sizes choose differently, and compute the same numbers.
    """
    available = room(config)
    if available is None:
        return "full; auto chooses by the memory of a GPU, and there is none here"
    filled = fill(config, available)
    filled.put_into(model)
    return str(filled)


def fill(config: Config, available: int) -> Filled:
    """Choose what fits into ``available`` bytes.

    A kind is raised only where there is room for all of the one before it.
    """
    model = build_architecture(config)
    run = RunOnMeta.of(config, model)
    chosen = Filled(room=available, blocks=model.facts.num_blocks, reward_blocks=_blocks_read(run.reward))
    chosen = _counted(run, chosen)
    for name, count in _larger(chosen):
        if not count:
            continue
        all_of_them = _counted(run, replace(chosen, **{name: count}))
        if all_of_them.peak <= available:
            chosen = all_of_them
            continue
        if all_of_them.peak == chosen.peak:  # of a phase that keeps no blocks, which leaves no room for any
            return chosen

        # About a straight line in the number of blocks; the peak of what is chosen is counted.
        fitting = int(count * (available - chosen.peak) / (all_of_them.peak - chosen.peak))
        for number in range(fitting, 0, -1):
            more = _counted(run, replace(chosen, **{name: number}))
            if more.peak <= available:
                return more
        return chosen
    return chosen


def _larger(filled: Filled) -> Iterator[tuple[str, int]]:
    """Yield the kinds in the order in which they are raised, and how many blocks each has at most."""
    yield "attention", filled.blocks
    yield "reward_attention", filled.reward_blocks
    yield "whole", filled.blocks
    yield "reward_whole", filled.reward_blocks


def _blocks_read(reward: Reward | None) -> int:
    """Return how many blocks a latent reward runs."""
    heads = reward.members if isinstance(reward, RewardEnsemble) else [reward]
    return max((max(head.blocks) + 1 for head in heads if isinstance(head, LatentReward)), default=0)


def _counted(run: RunOnMeta, filled: Filled) -> Filled:
    """Return the same with the predicted peak of the training."""
    filled.put_into(run.model)
    return replace(filled, peak=run.memory().training_peak)
