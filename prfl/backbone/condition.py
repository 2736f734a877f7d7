"""Conditions: what a backbone encodes prompts to, as named tensors, with the asks that each sample was encoded from."""

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
"""Names of tensors: a text encoder's embeddings, and the number of their tokens that are not padding."""


class Ask(str):
    """What one sample's condition is encoded from: a prompt and, for image-to-video families, a first frame.

    An ask is a string, its prompt, so code that reads prompts can read asks; a plain string is an ask without image.
    Asks with the same prompt but another image or clip are not equal.

    image: a file of the video's first frame, or a video that begins with it.
    clip: the size of the video, on which a condition with an image depends.
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
        """The ask of guidance's unconditional branch: the empty prompt, with the same first frame."""
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
    """Turn plain prompts into asks without an image."""
    assert not isinstance(asks, str), "give a list of prompts, not one prompt"
    return tuple(ask if isinstance(ask, Ask) else Ask(ask) for ask in asks)


def check_asks(asks: Iterable[str], takes: frozenset[str], where: str = "data.prompts") -> None:
    """Raise PrflError for a first frame that the model does not take, or for a missing one that it needs.

    takes: from the model's ``Facts``.
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
    """Return the unconditional ask of each of these."""
    return [ask.unconditional for ask in as_asks(asks)]


def with_unconditional(asks: Iterable[str]) -> list[Ask]:
    """Return these asks, each after its unconditional one, without repetitions."""
    return list(dict.fromkeys(each for ask in as_asks(asks) for each in (ask.unconditional, ask)))


def identified(ask: str) -> str:
    """Return a text that identifies an ask by its prompt and the content of its image; for a plain prompt, the prompt.

    Raises OSError if the image is not there.
    """
    image = ask.image if isinstance(ask, Ask) else None
    return f"{ask}" if image is None else f"{ask}\n{remembered_hash(image)}"


def texts(asks: Iterable[str]) -> list[str]:
    """Return the prompts as plain strings, for comparing and looking up."""
    return [str(ask) for ask in asks]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a family's conditions.

    shape: of one sample.  None is the number of tokens, which differs between samples; "t", "h" and "w" are the sizes
    of the video's latents.  counts: the name of the tensor whose tokens this one counts; None if it counts none.
    """

    shape: tuple[int | str | None, ...]
    dtype: torch.dtype
    counts: str | None = None

    @property
    def ragged(self) -> bool:
        return None in self.shape

    def of_video(self, state: Sequence[int]) -> tuple[int | None, ...]:
        """Return the shape for a sample whose latents are (c, t, h, w); None stays the number of tokens."""
        axes = dict(zip("cthw", state, strict=False))
        return tuple(axes[size] if isinstance(size, str) else size for size in self.shape)

    def sized(self, tokens: int, state: Sequence[int]) -> tuple[int, ...]:
        """Return the shape for a sample with so many tokens."""
        return tuple(tokens if size is None else size for size in self.of_video(state))


@dataclass(frozen=True)
class Condition:
    """A batch of conditions.

    tensors: by name, each (batch, ...).  asks: what each sample was encoded from.
    ragged: names of tensors whose second axis is as long as the batch's longest sample; shorter ones end in zeros.
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
    """Pad the second axis with zeros to the longest tensor's length."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return [F.pad(x, (*(0, 0) * (x.ndim - 2), 0, longest - x.shape[1])) for x in tensors]


def stand_in(
    specs: Mapping[str, TensorSpec],
    batch: int,
    tokens: int,
    state: Sequence[int],
    make: Callable[[tuple[int, ...]], Tensor],
) -> Condition:
    """Make a condition without a prompt, for checks and dry runs, which need only its shapes.

    Every sample has ``tokens`` tokens, none of them padding.  state: (c, t, h, w) of the latents.
    make: makes a floating-point tensor of a shape.
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
