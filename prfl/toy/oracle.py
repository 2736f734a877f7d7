"""The exact judge of the shapes world: measures a decoded video against its caption.

Nothing here is learned and nothing is differentiated.  Every frame's foreground is found by its distance from the
grey background; from that mask come colour, centroid, area and shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prfl.toy.renderer import ATTRIBUTES, BACKGROUND, COLOURS, DIRECTIONS, RADIUS, SHAPES, SIZE, Attributes, coverage

DIMENSIONS = ("shape", "colour", "direction", "speed", "steadiness")
AREA_PER_RADIUS_SQUARED = {"circle": torch.pi, "bar": 2.6 * 1.1, "triangle": 5.196 * 0.66**2}


def judge(videos: Tensor, captions: list[str]) -> dict[str, Tensor]:
    """Tell which of DIMENSIONS each video gets right, and ``all`` of them together.

    videos: (batch, 3, frames, 32, 32) in [-1, 1]; captions: one per video.
    Returns bool tensors of shape (batch,).
    """
    return compare(measure(videos), captions)


def compare(measured: dict[str, Tensor], captions: list[str]) -> dict[str, Tensor]:
    """Judge videos that are ``measure``d already."""
    captioned = [Attributes.parse(caption) for caption in captions]
    right = {}
    for name, values in ATTRIBUTES.items():
        expected = torch.tensor([values.index(getattr(attributes, name)) for attributes in captioned])
        right[name] = measured[name] == expected
    right["steadiness"] = measured["steadiness"]
    right["all"] = torch.stack([right[name] for name in DIMENSIONS]).all(0)
    return right


def size(measured: dict[str, Tensor], captions: list[str]) -> Tensor:
    """Divide the area of each video's shape by the mean area that the world draws of the shape in its caption.

    No verdict: a policy may be right in everything and draw everything larger.
    """
    radius_squared = sum(r * r for r in (RADIUS[0], (RADIUS[0] * RADIUS[1]) ** 0.5, RADIUS[1])) / 3  # of an even draw
    areas = [AREA_PER_RADIUS_SQUARED[Attributes.parse(caption).shape] * radius_squared for caption in captions]
    return measured["area"] / torch.tensor(areas)


def measure(videos: Tensor) -> dict[str, Tensor]:
    """Measure videos: index of each attribute (-1: none of them), whether the motion is steady, the median area."""
    pixels = (videos.detach().float().cpu().clamp(-1, 1) + 1) / 2  # (b, 3, t, h, w)
    deviation = pixels - BACKGROUND
    palette = torch.tensor(list(COLOURS.values())) - BACKGROUND  # (k, 3)

    # Colour: the mean of the clearly foreground pixels, over all frames, against the palette.
    strength = deviation.norm(dim=1)  # (b, t, h, w)
    weight = (strength - 0.25).clamp(min=0)
    mean = (deviation * weight[:, None]).sum((2, 3, 4)) / weight.sum((1, 2, 3)).clamp(min=1e-3)[:, None]
    distance = (mean[:, None] - palette[None]).norm(dim=-1)  # (b, k)
    nearest, colour = distance.min(1)
    colour = torch.where(nearest < 0.30, colour, -1)

    # The mask: how far each pixel went from the background towards the seen colour.
    direction = torch.nn.functional.normalize(mean, dim=1)
    length = mean.norm(dim=1).clamp(min=0.1)
    mask = (deviation * direction[:, :, None, None, None]).sum(1) / length[:, None, None, None]
    mask = ((mask - 0.1) / 0.9).clamp(0, 1)  # (b, t, h, w)
    area = mask.sum((2, 3))  # (b, t)
    grid = torch.arange(SIZE) + 0.5
    x = (mask.sum(2) * grid).sum(-1) / area.clamp(min=1e-3)
    y = (mask.sum(3) * grid).sum(-1) / area.clamp(min=1e-3)

    # Motion: a straight line through the centroids.  Fresh clips stay within 0.1 px of theirs, and those that jump are
    # 2.8 px or more away: the limit below lies in the middle.
    time = torch.linspace(0, 1, x.shape[1])
    centred = time - time.mean()
    travel = torch.stack([(x * centred).sum(1), (y * centred).sum(1)], 1) / (centred**2).sum()  # (b, 2)
    fit_x = x.mean(1, keepdim=True) + travel[:, :1] * centred
    fit_y = y.mean(1, keepdim=True) + travel[:, 1:] * centred
    residual = ((x - fit_x) ** 2 + (y - fit_y) ** 2).sqrt().amax(1)
    compass = torch.tensor(list(DIRECTIONS.values()))
    along, heading = (travel @ compass.T).max(1)
    straight = along > 0.8 * travel.norm(dim=1).clamp(min=1e-3)
    heading = torch.where(straight & (along > 1.5), heading, -1)
    speed = torch.full_like(heading, -1)
    speed[(along > 1.5) & (along < 6.5)] = 0
    speed[(along > 7.5) & (along < 15.0)] = 1

    # Shape: the template of the same area and place that overlaps best, and well enough.
    overlap = torch.stack([_overlap(mask, shape, x, y, area) for shape in SHAPES], 1)  # (b, shapes)
    best, shape_index = overlap.max(1)
    shape_index = torch.where(best > 0.72, shape_index, -1)

    median = area.median(1).values
    ratio = area / median.clamp(min=1e-3)[:, None]
    size_kept = (ratio.amax(1) < 1.3) & (ratio.amin(1) > 0.72) & (median > 60) & (median < 190)
    return {
        "shape": shape_index,
        "colour": colour,
        "direction": heading,
        "speed": speed,
        "steadiness": size_kept & (residual < 1.5),
        "area": median,
    }


def _overlap(mask: Tensor, shape: str, x: Tensor, y: Tensor, area: Tensor) -> Tensor:
    """Average over frames the soft intersection over union with the template of that shape."""
    grid = torch.arange(SIZE) + 0.5
    radius = (area / AREA_PER_RADIUS_SQUARED[shape]).sqrt()[:, :, None, None]
    template = coverage(
        shape, grid[None, None, None, :] - x[:, :, None, None], grid[None, None, :, None] - y[:, :, None, None], radius
    )
    joint = torch.minimum(mask, template).sum((2, 3))
    return (joint / torch.maximum(mask, template).sum((2, 3)).clamp(min=1e-3)).mean(1)
