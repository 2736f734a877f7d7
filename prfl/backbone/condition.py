"""What a backbone makes of prompts: named tensors, with what each of them was made of beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prfl.utils.errors import PrflError
from prfl.utils.hashing import remembered_hash
from prfl.utils.video_size import VideoSize

EMBEDS, LENGTHS = "prompt_embeds", "lengths"
"""One text encoder's embeddings, and how many of their tokens are no padding, where a family has them."""


class Ask(str):
    """What the condition of one sample is made of, and found by: a prompt, and where a family takes one a first frame.

    It is its prompt, a string, so that whatever reads prompts reads it; a string alone is the ask with nothing else.
    Two asks of one prompt with other images, or clips, are not equal.

    image: a file of the video's first frame, or a video that begins with it.  clip: the size of the video, that
    conditions with an image depend on.
    """

    image: Path | None
    clip: VideoSize | None

    def __new__(cls, prompt: str, image: Path | None = None, clip: VideoSize | None = None) -> Ask:
        ask = super().__new__(cls, prompt)
        ask.image, ask.clip = image, clip
        return ask

    def __getnewargs__(self) -> tuple[str, Path | None, VideoSize | None]:  # type: ignore[override] # of more than str
        return self.prompt, self.image, self.clip

    @property
    def prompt(self) -> str:
        """The prompt alone."""
        return str(self)

    @property
    def unconditional(self) -> Ask:
        """What guidance goes away from: the empty prompt, with the same first frame."""
        return Ask("", self.image, self.clip)

    @property
    def _key(self) -> tuple[str, Path | None, VideoSize | None]:
        return self.prompt, self.image, self.clip

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Ask):
            return self._key == other._key
        return self._key == (other, None, None)

    def __ne__(self, other: object) -> bool:  # str has its own
        return not self == other

    def __hash__(self) -> int:
        return hash(self.prompt if self.image is None and self.clip is None else self._key)


def as_asks(asks: Iterable[str]) -> tuple[Ask, ...]:
    """A prompt alone stands for the ask that has nothing else."""
    assert not isinstance(asks, str), "give a list of prompts, not one prompt"
    return tuple(ask if isinstance(ask, Ask) else Ask(ask) for ask in asks)


def check_asks(asks: Iterable[str], takes: frozenset[str], where: str = "data.prompts") -> None:
    """Raise PrflError for a first frame that a model does not take, or that is missing where it needs one.

    takes: of the model's ``Facts``.
    """
    for ask in as_asks(asks):
        shown = f"the prompt {ask.prompt[:80]!r}"
        if "image" not in takes and ask.image is not None:
            what = f"a text-to-video model takes no first frame, and {shown} has {ask.image.name}"
            raise PrflError(what, where=where, fix="give prompts alone")
        if "image" in takes and (ask.image is None or ask.clip is None):
            fix = 'lines of {"prompt": ..., "image": "first.png"} in a .jsonl file, or those of clips '
            fix += "(data.prompts.first_frames: true); in Python Ask(prompt, image, clip)"
            raise PrflError(f"an image-to-video model needs a first frame, and {shown} has none", where=where, fix=fix)


def unconditional(asks: Iterable[str]) -> list[Ask]:
    """What guidance goes away from, for each of these."""
    return [ask.unconditional for ask in as_asks(asks)]


def with_unconditional(asks: Iterable[str]) -> list[Ask]:
    """These asks, each behind its unconditional one; once each."""
    return list(dict.fromkeys(each for ask in as_asks(asks) for each in (ask.unconditional, ask)))


def identified(ask: str) -> str:
    """A text that tells an ask from any other, whatever its image is called.  Raises OSError for one that is not there.

    Of a prompt alone it is the prompt.
    """
    image = ask.image if isinstance(ask, Ask) else None
    return f"{ask}" if image is None else f"{ask}\n{remembered_hash(image)}"


def texts(asks: Iterable[str]) -> list[str]:
    """The prompts alone, for what compares or looks up by them."""
    return [str(ask) for ask in asks]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a family's conditions.

    shape: of one sample; None is its tokens, of which samples have different numbers; "t", "h" and "w" are the video's
    latents'.  counts: the name of the tensor whose tokens this one counts.
    """

    shape: tuple[int | str | None, ...]
    dtype: torch.dtype
    counts: str | None = None

    @property
    def ragged(self) -> bool:
        return None in self.shape

    def of_video(self, state: Sequence[int]) -> tuple[int | None, ...]:
        """The shape of a sample whose latents have the state (c, t, h, w)."""
        axes = dict(zip("cthw", state, strict=False))
        return tuple(axes[size] if isinstance(size, str) else size for size in self.shape)

    def sized(self, tokens: int, state: Sequence[int]) -> tuple[int, ...]:
        """The same, with so many tokens."""
        return tuple(tokens if size is None else size for size in self.of_video(state))


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
    specs: Mapping[str, TensorSpec],
    batch: int,
    tokens: int,
    state: Sequence[int],
    make: Callable[[tuple[int, ...]], Tensor],
) -> Condition:
    """A condition of no prompt: for checks and dry runs, which need its shapes alone.

    Every sample has ``tokens`` tokens, none of them padding.  state: (c, t, h, w) of the latents.  make: a tensor of a
    shape, for those of floating point.
    """
    tensors = {}
    for name, spec in specs.items():
        shape = (batch, *spec.sized(tokens, state))
        if spec.dtype.is_floating_point:
            tensors[name] = make(shape).to(spec.dtype)
        else:  # a count of tokens, or a mask that leaves none out
            tensors[name] = torch.full(shape, tokens if spec.counts else 1, dtype=spec.dtype)
    ragged = frozenset(name for name, spec in specs.items() if spec.ragged)
    return Condition(tensors, (Ask(""),) * batch, ragged)
