"""A network whose weights are one safetensors file, as ComfyUI and the models' authors give them out.

The file's names may be diffusers' own, or the original ones where diffusers knows how to translate them (Wan's
transformers and VAEs).  Its config is that of a pipeline's folder: a file has none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from prfl.utils.errors import PrflError
from prfl.utils.files import read_tensors

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "first_stage_model.", "vae.")
FIX = "give a file of this very model, whole, in float32, bfloat16 or float16, in the original names or diffusers'"
SHOWN = 3


def load_single_file(kind: Any, config: Mapping[str, Any], path: Path) -> nn.Module:
    """The diffusers model of this class and config, with the weights of ``path``, in their types.

    Raises PrflError where the file cannot be read, or lacks weights, or has others, or of another shape: names them.
    """
    tensors = without_prefix(read_tensors(path, FIX))
    with init_empty_weights():  # buffers that no file has, as rotations, are made
        model = kind.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = in_diffusers_names(kind, config, tensors, shapes)
    check_same(shapes, {name: tuple(tensor.shape) for name, tensor in weights.items()}, path)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names behind the prefix that programs put before all of them."""
    prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def in_diffusers_names(
    kind: Any, config: Mapping[str, Any], tensors: dict[str, Tensor], expected: Collection[str]
) -> dict[str, Tensor]:
    """Translate the names where diffusers can and they are not its own already."""
    translate = SINGLE_FILE_LOADABLE_CLASSES.get(kind.__name__, {}).get("checkpoint_mapping_fn")
    if translate is None or tensors.keys() <= set(expected):
        return tensors
    return translate(config=config, checkpoint=dict(tensors))


def check_same(expected: Mapping[str, tuple[int, ...]], in_file: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise PrflError unless a file has just the weights of the model, in its shapes."""
    for names, what in (
        ([name for name in expected if name not in in_file], "lacks"),
        ([name for name in in_file if name not in expected], "has, and the model has not,"),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            what = f"of the model's {len(expected)} weights and the file's {len(in_file)}, the file {what} "
            raise PrflError(f"{what}{', '.join(names[:SHOWN])}{more}", where=str(path), fix=FIX)
    if wrong := [name for name in expected if expected[name] != in_file[name]]:
        what = f"{len(wrong)} of its weights have another shape than the model's: {wrong[0]} is {in_file[wrong[0]]}"
        raise PrflError(f"{what}, not {expected[wrong[0]]}", where=str(path), fix=FIX)
