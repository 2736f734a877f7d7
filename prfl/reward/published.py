"""Files of tensors that others made: safetensors, or a pickle of which the tensors are read and no code is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from prfl.utils.errors import PrflError
from prfl.utils.reading import disk_refuses, unreadable


def published_tensors(path: Path, what: str, fix: str) -> dict[str, Tensor]:
    """Read the tensors of a file by their names, without the wrappings of a training run around them.

    what: what the file should hold, for the errors, as "a CLIP".
    Raises PrflError where it cannot be read, holds something else, or a tensor is not finite.
    """
    where = str(path)
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails with errors of many classes, as pickle's own page says
        if isinstance(error, OSError) and disk_refuses(path, error):
            raise unreadable(path, error, fix) from error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise PrflError(f"cannot be read as {what}: {reason}", where=where, fix=fix) from error

    for wrapping in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise PrflError(f"holds no {what.partition(' ')[2]}: it is no dictionary of tensors", where=where, fix=fix)
    tensors = {str(name).removeprefix("module."): value for name, value in content.items()}
    for name, value in tensors.items():
        if not is_stored(value):
            raise PrflError(f"'{name}' is no plain tensor whose numbers are all in the file", where=where, fix=fix)
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise PrflError(f"{', '.join(broken[:3])} is not finite", where=where, fix="download the file again")
    return tensors


def is_stored(value: Tensor) -> bool:
    """Whether each of its numbers is in memory: a view of a few, or a sparse one, may claim any size."""
    if value.layout != torch.strided:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()
