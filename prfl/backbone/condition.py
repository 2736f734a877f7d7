"""What a backbone makes of prompts: named tensors, with what each of them was made of beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl.utils.video_size import VideoSize

EMBEDS, LENGTHS = "prompt_embeds", "lengths"
"""One text encoder's embeddings, and how many of their tokens are no padding, where a family has them."""


@dataclass(frozen=True)
class Ask:
    """What the condition of one sample is made of, and found by.

    image: the video's first frame, for families that take one.  clip: for families whose condition depends on the size.
    """

    prompt: str
    image: Path | None = None
    clip: VideoSize | None = None


def as_asks(asks: Sequence[Ask | str]) -> tuple[Ask, ...]:
    """A prompt alone stands for the ask that has nothing else."""
    assert not isinstance(asks, str), "give a list of prompts, not one prompt"
    return tuple(Ask(ask) if isinstance(ask, str) else ask for ask in asks)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a family's conditions.

    shape: of one sample; None is its tokens, of which samples have different numbers.  counts: the name of the tensor
    whose tokens this one counts.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    counts: str | None = None

    @property
    def ragged(self) -> bool:
        return None in self.shape

    def sized(self, tokens: int) -> tuple[int, ...]:
        """The shape of a sample with so many tokens."""
        return tuple(tokens if size is None else size for size in self.shape)


@dataclass(frozen=True)
class Condition:
    """A batch of conditions.

    tensors: by name, each (batch, ...).  asks: what each sample was made of.  ragged: the tensors whose second axis is
    as long as the batch's longest sample, with zeros behind the shorter ones.
    """

    tensors: dict[str, Tensor]
    asks: tuple[Ask, ...]
    ragged: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        sizes = {name: len(tensor) for name, tensor in self.tensors.items()}
        assert set(sizes.values()) <= {len(self.asks)}, f"{len(self.asks)} asks, but tensors of {sizes}"

    def __len__(self) -> int:
        return len(self.asks)

    def __getitem__(self, index: slice | Tensor | list[int]) -> Condition:
        """Select, reorder or repeat samples."""
        rows = torch.arange(len(self))[index.cpu() if isinstance(index, Tensor) else index].tolist()
        tensors = {name: tensor[index] for name, tensor in self.tensors.items()}
        return Condition(tensors, tuple(self.asks[row] for row in rows), self.ragged)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move all tensors to a device, and those of floating point to a dtype."""
        moved = {
            name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            for name, tensor in self.tensors.items()
        }
        return Condition(moved, self.asks, self.ragged)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Join batches, padding the ragged tensors with zeros to the longest."""
        first = conditions[0]
        tensors = {}
        for name in first.tensors:
            parts = [condition.tensors[name] for condition in conditions]
            tensors[name] = torch.cat(padded(parts) if name in first.ragged else parts)
        return Condition(tensors, tuple(ask for condition in conditions for ask in condition.asks), first.ragged)


def padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros behind the second axis, up to the longest."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return [F.pad(x, (*(0, 0) * (x.ndim - 2), 0, longest - x.shape[1])) for x in tensors]


def stand_in(
    specs: Mapping[str, TensorSpec], batch: int, tokens: int, make: Callable[[tuple[int, ...]], Tensor]
) -> Condition:
    """A condition of no prompt: for checks and dry runs, which need its shapes alone.

    Every sample has ``tokens`` tokens, none of them padding.  make: a tensor of a shape, for those of floating point.
    """
    tensors = {}
    for name, spec in specs.items():
        shape = (batch, *spec.sized(tokens))
        if spec.dtype.is_floating_point:
            tensors[name] = make(shape).to(spec.dtype)
        else:  # a count of tokens, or a mask that leaves none out
            tensors[name] = torch.full(shape, tokens if spec.counts else 1, dtype=spec.dtype)
    ragged = frozenset(name for name, spec in specs.items() if spec.ragged)
    return Condition(tensors, (Ask(""),) * batch, ragged)
