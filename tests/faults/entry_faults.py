"""Damaged or foreign entries of the cache: put aside, counted, and encoded again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.faults.planting import Bench, warning


def entries(kind: str) -> list[Path]:
    return sorted(Path(f"cache/{kind}").glob("*.safetensors"))


def rewritten(kind: str, change: Callable[[dict], None]) -> None:
    """The first entry with other tensors and the metadata of the old ones."""
    file = entries(kind)[0]
    with safe_open(file, framework="pt") as opened:
        notes = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata=notes)


def cached(bench: Bench, *overrides: str) -> str:
    return bench.warned("cache", "sft.yaml", *overrides)


@warning("an empty cache entry", "1 entries do not hold", "*.damaged", "encoded again", "is damaged")
def _(bench):
    entries("latents")[0].write_bytes(b"")
    return cached(bench)


@warning("a cache entry that is no safetensors file", "1 entries do not hold", "is damaged")
def _(bench):
    entries("prompts")[0].write_text("<html>404</html>" * 100)
    return cached(bench)


@warning("a cache entry with another tensor", "1 entries do not hold", "it holds pixels, not latents")
def _(bench):
    rewritten("latents", lambda tensors: tensors.update(pixels=tensors.pop("latents")))
    return cached(bench)


@warning("a cache entry of another dtype", "its latents are (4, 2, 4, 4) torch.float16, not")
def _(bench):
    rewritten("latents", lambda tensors: tensors.update(latents=tensors["latents"].half()))
    return cached(bench)


@warning("a cache entry of another rank", "its prompt_embeds are", "not (1, tokens, 16)")
def _(bench):
    rewritten("prompts", lambda tensors: tensors.update(prompt_embeds=tensors["prompt_embeds"][0]))
    return cached(bench)


@warning("a cache entry that is not finite", "its latents are not finite")
def _(bench):
    rewritten("latents", lambda tensors: tensors["latents"][0].fill_(torch.nan))
    return cached(bench)


@warning("a cache entry with a flipped bit", "its content is not what was written")
def _(bench):
    data = bytearray(entries("latents")[0].read_bytes())
    data[-100] ^= 1
    entries("latents")[0].write_bytes(bytes(data))
    return cached(bench)


@warning("two cache entries that changed places", "2 entries do not hold", "it is of another video")
def _(bench):
    one, two = entries("latents")[:2]
    os.rename(one, "kept")
    os.rename(two, one)
    os.rename("kept", two)
    return cached(bench)


@warning("a cache entry of another frame rate", "it is of another clip: fps 10.0, not 8.0")
def _(bench):
    return renamed(bench, "data.fps=10")


@warning("a cache entry of another model", "it is of another model: model_id other, not")
def _(bench):
    return renamed(bench, bench.other_model())


@warning("a cache entry of another normalisation", "it is of another model: latents_mean [0.5, ")
def _(bench):
    folder = shutil.copytree(bench.model, bench.folder / "normal" / bench.model.name)
    config = json.loads((folder / "vae/config.json").read_text())
    config["latents_mean"][0] = 0.5
    (folder / "vae/config.json").write_text(json.dumps(config))
    return renamed(bench, f"backbone.model={folder}")


def renamed(bench: Bench, change: str) -> str:
    """The same clips under other settings, under the names of the right ones."""
    right = entries("latents")
    bench.warned("cache", "sft.yaml", change)
    other = [file for file in entries("latents") if file not in right]
    for target, file in zip(right, other, strict=True):
        os.replace(file, target)
    return cached(bench)
