"""A seeded renderer of captioned videos: one shape of one colour moves in one direction at one speed.

A clip is described by a :class:`Scene`; :func:`render` draws a batch of scenes.  Pretraining data carry the flaws
that people dislike (:func:`sample_scenes`): a caption with one wrong attribute, a wobbling size, flicker, a jump.

Units: lengths in pixels of a 32 x 32 frame, speeds in pixels per clip, colours in [0, 1], videos in [-1, 1].
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FRAMES, SIZE, FPS = 17, 32, 8

SHAPES = ("circle", "bar", "triangle")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.15, 0.20, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "purple": (0.75, 0.10, 0.85),
    "cyan": (0.10, 0.85, 0.90),
}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SPEEDS = {"slowly": (3.0, 4.5), "quickly": (9.5, 11.5)}  # pixels travelled over the whole clip
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
}
BACKGROUND = 0.5
RADIUS = (6.2, 7.0)
MARGIN = 10.0  # the centre stays this far from the border, so that no shape is ever cut off
FLAWS = ("wobble", "flicker", "jump")


@dataclass(frozen=True)
class Attributes:
    """The four things that a caption says of a clip."""

    shape: str
    colour: str
    direction: str
    speed: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction} {self.speed}"

    @staticmethod
    def parse(caption: str) -> Attributes:
        """Read a caption, the inverse of :attr:`caption`.  Raises ValueError on any other text."""
        words = caption.split()
        if len(words) != 6 or words[0] != "a" or words[3] != "moves":
            raise ValueError(f"not a caption of the shapes world: {caption!r}")

        attributes = Attributes(shape=words[2], colour=words[1], direction=words[4], speed=words[5])
        for name, values in ATTRIBUTES.items():
            if getattr(attributes, name) not in values:
                raise ValueError(f"unknown {name} {getattr(attributes, name)!r} in caption {caption!r}")
        return attributes


@dataclass(frozen=True)
class Scene:
    """One clip: what is drawn (``drawn``), what its caption says (``captioned``), and how it moves frame by frame."""

    captioned: Attributes
    drawn: Attributes
    radius: float
    start: tuple[float, float]
    travel: float
    flaw: str = ""  # "" or one of FLAWS
    phase: float = 0.0  # in [0, 1): where in the clip the flaw sits


def all_attributes() -> list[Attributes]:
    """List every combination, in a fixed order (144)."""
    return [Attributes(*values) for values in itertools.product(*ATTRIBUTES.values())]


def split_prompts(seed: int = 0) -> dict[str, list[str]]:
    """Split the 144 captions, always alike: 88 train, 24 validation, 32 test.  No split shares a caption."""
    captions = [a.caption for a in all_attributes()]
    random.Random(seed).shuffle(captions)
    return {"train": captions[:88], "validation": captions[88:112], "test": captions[112:]}


def make_scene(rng: random.Random, captioned: Attributes, drawn: Attributes | None = None, flaw: str = "") -> Scene:
    """Draw a size, start and speed for these attributes; the whole path stays inside the frame."""
    drawn = drawn or captioned
    travel = rng.uniform(*SPEEDS[drawn.speed])
    dx, dy = DIRECTIONS[drawn.direction]

    def start(step: float) -> float:
        low, high = MARGIN, SIZE - MARGIN
        return rng.uniform(low - min(step, 0.0), high - max(step, 0.0))

    radius = rng.uniform(*RADIUS)
    return Scene(captioned, drawn, radius, (start(dx * travel), start(dy * travel)), travel, flaw, rng.random())


def sample_scenes(
    seed: int, index: int, count: int, captions: list[str], wrong: float = 0.0, unsteady: float = 0.0
) -> list[Scene]:
    """Draw ``count`` scenes with captions from ``captions``: a function of (seed, index) only.

    wrong: share of clips that show one attribute other than the caption says.
    unsteady: share of clips that carry one of FLAWS.
    """
    rng = random.Random(f"{seed}-{index}")
    scenes = []
    for _ in range(count):
        captioned = Attributes.parse(rng.choice(captions))
        drawn = captioned
        if rng.random() < wrong:
            drawn = swap_attribute(captioned, rng.choice(list(ATTRIBUTES)), rng)
        flaw = rng.choice(FLAWS) if rng.random() < unsteady else ""
        scenes.append(make_scene(rng, captioned, drawn, flaw))
    return scenes


def swap_attribute(attributes: Attributes, name: str, rng: random.Random) -> Attributes:
    """Change the attribute ``name`` to another value."""
    others = [value for value in ATTRIBUTES[name] if value != getattr(attributes, name)]
    return replace(attributes, **{name: rng.choice(others)})


def coverage(shape: str, offset_x: Tensor, offset_y: Tensor, radius: Tensor) -> Tensor:
    """Compute the anti-aliased coverage in [0, 1] of pixels at an offset from the shape's centroid (all broadcast)."""
    if shape == "circle":
        distance = torch.sqrt(offset_x**2 + offset_y**2 + 1e-9) - radius
    elif shape == "bar":  # lying; wide enough that no blur makes a circle of it
        distance = torch.maximum(offset_x.abs() - 1.3 * radius, offset_y.abs() - 0.55 * radius)
    else:  # equilateral triangle, point up; its inradius is half its circumradius
        slope = math.sqrt(3) / 2 * offset_x.abs() - 0.5 * offset_y
        distance = torch.maximum(offset_y, slope) - 0.66 * radius
    return (0.5 - distance).clamp(0, 1)


def _motion(scene: Scene) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute for each frame: centre x, centre y, radius, contrast against the background."""
    time = torch.linspace(0, 1, FRAMES)
    dx, dy = DIRECTIONS[scene.drawn.direction]
    x, y = scene.start[0] + dx * scene.travel * time, scene.start[1] + dy * scene.travel * time
    radius, contrast = torch.full((FRAMES,), scene.radius), torch.ones(FRAMES)

    if scene.flaw == "wobble":
        radius = radius * (1 + 0.22 * torch.sin(2 * math.pi * (2 * time + scene.phase)))
    elif scene.flaw == "flicker":
        contrast = 0.675 + 0.325 * torch.cos(2 * math.pi * (2 * time + scene.phase))
    elif scene.flaw == "jump":
        after = (time > 0.25 + 0.5 * scene.phase).float()
        side_x, side_y = (0.0, 1.0) if dx else (1.0, 0.0)
        room = scene.start[1] if dx else scene.start[0]
        sign = 1.0 if room < SIZE / 2 else -1.0
        x, y = x + 6 * sign * side_x * after, y + 6 * sign * side_y * after
    return x, y, radius, contrast


def render(scenes: list[Scene]) -> Tensor:
    """Draw the scenes: float32 (batch, 3, 17, 32, 32) in [-1, 1]."""
    grid = torch.arange(SIZE) + 0.5
    pixel_y, pixel_x = torch.meshgrid(grid, grid, indexing="ij")
    videos = []
    for scene in scenes:
        x, y, radius, contrast = (value[:, None, None] for value in _motion(scene))
        mask = coverage(scene.drawn.shape, pixel_x - x, pixel_y - y, radius) * contrast
        colour = torch.tensor(COLOURS[scene.drawn.colour])[:, None, None, None]
        videos.append(BACKGROUND + mask * (colour - BACKGROUND))
    return torch.stack(videos) * 2 - 1
