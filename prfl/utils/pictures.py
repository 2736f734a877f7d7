"""Picture files in and out, and pictures fitted to a size.  Pixels are float32 in [-1, 1], (3, height, width)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write
from prfl.utils.formats import SUFFIXES as VIDEOS
from prfl.utils.reading import disk_refuses, unreadable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 8192 * 8192


def read_first_frame(path: Path, height: int, width: int) -> Tensor:
    """Read a picture, or a video's first picture, scaled until it covers height x width and cropped to it.

    Raises PrflError for a file that is neither a picture nor a video.
    """
    if path.suffix.lower() not in VIDEOS:
        return fitted(read_picture(path), height, width)
    from prfl.utils.decoding import first_picture  # PyAV is imported only where videos are read

    return first_picture(path, height, width)


def read_picture(path: Path) -> Tensor:
    """Read a picture in the orientation that viewers show.  Raises PrflError if it is not a picture, or too large."""
    fix = f"give a picture as {', '.join(SUFFIXES)}"
    if path.suffix.lower() not in SUFFIXES:
        raise PrflError(f"'{path.suffix}' is no suffix of a picture that prfl reads", where=str(path), fix=fix)
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise PrflError(f"is of {opened.width} x {opened.height} pixels", where=str(path), fix="scale it down")
            levels = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except UnidentifiedImageError as error:
        raise PrflError("is no picture, or a damaged one", where=str(path), fix=fix) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and disk_refuses(path, error):
            raise unreadable(path, error, "name a picture that is there") from error
        raise PrflError(f"cannot be decoded: {error}", where=str(path), fix=fix) from error
    return torch.from_numpy(levels).permute(2, 0, 1).float() / 127.5 - 1


def write_picture(path: Path, pixels: Tensor) -> None:
    """Write a .png.  Pixels that were read from levels of 0 to 255 are written as exactly these levels."""
    with atomic_write(path) as temporary:
        as_image(pixels).save(temporary, format="png")


def as_image(pixels: Tensor) -> Image.Image:
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def fitted(picture: Tensor, height: int, width: int, aspect: float = 1.0) -> Tensor:
    """Scale a picture until it covers height x width, and crop its middle.  aspect: a source pixel's width / height."""
    _, from_height, from_width = picture.shape
    scale = max(height / from_height, width / (from_width * aspect))
    size = max(height, round(from_height * scale)), max(width, round(from_width * aspect * scale))
    if size != (from_height, from_width):
        picture = torch.nn.functional.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return picture[:, top : top + height, left : left + width]
