"""Rewards that are a Qwen2-VL whose hidden states at special tokens are scores: VideoAlign's and HPSv3's shape.

    x = text before, the tower's tokens of the pictures, text behind, with a special token for each dimension
    score[k] = (head(language model(x) at token k) - mean[k]) / std[k]

The pictures' tokens have the places of text, 0, 1, 2, ..., as both rewards are trained: their code hands the language
model embeddings alone, so that Qwen2-VL's places in time, height and width are never made.  Nothing is scattered into
the text and no sequence is padded: videos are read one after another.

A folder of such a reward is made once by ``prfl convert`` (qwen_convert.py) of what its authors publish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.vision_utils import get_vision_position_ids

from prfl.reward.look import computed_again
from prfl.reward.public import FrozenReward, load_network
from prfl.reward.qwen_look import QwenLook
from prfl.reward.tokens import load_tokenizer
from prfl.utils.errors import PrflError

READING, HEAD = "reading.json", "head.safetensors"
PROMPT = "{prompt}"  # its place in the text
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Reading:
    """How a reward is asked, and what its scores are.

    text: the whole chat, with ``pictures`` where they are and {prompt}.  tokens: the special ones, one a dimension.
    fps: frames that it reads of a second of video; None scores single pictures.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    text: str
    pictures: str
    tokens: tuple[str, ...]
    dimensions: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    most_pixels: int
    fewest_pixels: int
    fps: float | None = None

    def __post_init__(self) -> None:
        for part in (PROMPT, self.pictures, *self.tokens):
            if self.text.count(part) != 1:
                what = f"its text has {self.text.count(part)} places for {part}, and must have one"
                raise PrflError(what, where=READING, fix="convert the reward again")
        if not len(self.tokens) == len(self.dimensions) == len(self.mean) == len(self.std):
            raise PrflError("it does not say as much of each dimension", where=READING, fix="convert the reward again")


@dataclass(frozen=True)
class Words:
    """Turns a prompt into the tokens of the whole text.  pictures, special: the numbers of those tokens."""

    encode: Callable[[str], list[int]]
    pictures: int
    special: tuple[int, ...]

    @staticmethod
    def of(reading: Reading, tokenizer: Any, where: str) -> Words:
        """Raises PrflError for a tokenizer that has not all of the special tokens."""
        pictures, *special = (tokenizer.convert_tokens_to_ids(name) for name in (reading.pictures, *reading.tokens))
        if None in (pictures, *special) or len({tokenizer.unk_token_id, pictures, *special}) < 2 + len(special):
            what = f"its tokenizer does not know {reading.pictures} and {', '.join(reading.tokens)}"
            raise PrflError(what, where=where, fix="convert the reward again")

        def encode(prompt: str) -> list[int]:
            return tokenizer(reading.text.replace(PROMPT, prompt), add_special_tokens=False).input_ids

        return Words(encode, pictures, tuple(special))


class QwenScore(FrozenReward):
    """What VideoAlign and HPSv3 share: ``score`` reads one video, or pictures of one prompt."""

    frames_at_once: int | None = None
    by_layer = False  # whether activations are computed again layer by layer, or all of a pass at once

    def __init__(self, network: Qwen2VLModel, head: nn.Module, words: Words, reading: Reading) -> None:
        super().__init__(reading.dimensions, network, head)
        if self.by_layer:
            checkpoint_layers(network)
        self.network, self.head, self.words, self.reading = network, head, words, reading
        look = QwenLook.of(network.config, reading.most_pixels)
        self.look = replace(look, fewest_pixels=reading.fewest_pixels)

    def score(self, pixels: Float[Tensor, "n 3 f h w"], prompt: str) -> Float[Tensor, "n k"]:
        """Score videos of one prompt, or pictures as videos of one frame; activations are computed again.

        Not by layer: the tower and the language model free theirs one after the other, so that only one's are alive.
        """
        again = (lambda run, *inputs: run(*inputs)) if self.by_layer else computed_again
        ids = self.words.encode(prompt)
        places = [index for index, word in enumerate(ids) if word in self.words.special]
        if ids.count(self.words.pictures) != 1 or len(places) != len(self.dimensions):
            what = f"a prompt names a token of the reward's own: {prompt[:80]!r}"
            raise PrflError(what, where="data.prompts", fix="leave that token out of the prompt")
        pictures = again(self.see, pixels).unflatten(0, (len(pixels), -1))
        return again(partial(self.read, ids=ids, places=places), pictures)

    def see(self, pixels: Float[Tensor, "n 3 f h w"]) -> Float[Tensor, "tokens d"]:
        """Run the vision tower; its grid stays on the CPU, where its sizes are read."""
        values, _ = self.look.seen(pixels)
        grid, tower = grid_of(self.look, pixels), self.network.visual
        positions = get_vision_position_ids(grid, self.look.merge).to(values.device)
        return tower(values.to(tower.dtype), grid_thw=grid, position_ids=positions).pooler_output

    def read(
        self, pictures: Float[Tensor, "n tokens d"], *, ids: Sequence[int], places: Sequence[int]
    ) -> Float[Tensor, "n k"]:
        """Run the language model, and the head at the special tokens; the head in float32 at least."""
        model = self.network.language_model
        words = model.embed_tokens(torch.tensor(ids, device=pictures.device)).expand(len(pictures), -1, -1)
        at = ids.index(self.words.pictures)
        sequence = torch.cat([words[:, :at], pictures, words[:, at + 1 :]], dim=1)
        hidden = model(inputs_embeds=sequence, use_cache=False).last_hidden_state

        moved = [index + (pictures.shape[1] - 1 if index > at else 0) for index in places]
        chosen = hidden[:, moved]
        outputs = self.head(chosen.to(torch.promote_types(chosen.dtype, torch.float32)))  # (n, k, of the head)
        scores = outputs[..., 0] if outputs.shape[2] == 1 else outputs.diagonal(dim1=1, dim2=2)
        mean, std = (torch.tensor(values).to(scores) for values in (self.reading.mean, self.reading.std))
        return (scores - mean) / std


def checkpoint_layers(network: nn.Module) -> None:
    """Have every layer keep its input alone, as transformers does in training; nothing else there is of training."""
    for layer in network.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = layer.training = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def grid_of(look: QwenLook, pixels: Float[Tensor, "n 3 f h w"]) -> Tensor:
    """Count the patches of each video in time, height and width; on the CPU, where the tower reads them."""
    rows, columns = (size // look.patch for size in look.size(*pixels.shape[3:]))
    with torch.device("cpu"):
        return torch.tensor([[-(-pixels.shape[2] // look.step), rows, columns]] * len(pixels))


def read_folder(folder: str, dtype: Dtype, fix: str) -> tuple[Qwen2VLModel, nn.Module, Words, Reading]:
    """Read a converted reward.  fix: how to make one.  Raises PrflError."""
    path = Path(folder) / READING
    try:
        reading = TypeAdapter(Reading).validate_json(path.read_text(encoding="utf-8"), strict=True)
        tensors = load_file(Path(folder) / HEAD)
    except (OSError, SafetensorError, ValidationError) as error:
        reason = fault_of(error) if isinstance(error, ValidationError) else str(error).strip().split("\n")[0]
        raise PrflError(f"is no converted reward: {reason}", where=folder, fix=fix) from error
    head = head_of(tensors)
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise PrflError(f"holds no head: {' '.join(str(error).split())[:300]}", where=folder, fix=fix) from error
    network = load_network(Qwen2VLModel, folder, None, "one that prfl convert wrote", getattr(torch, dtype))
    return network, head, Words.of(reading, load_tokenizer(folder, None, "Qwen/Qwen2-VL-2B-Instruct"), folder), reading


def fault_of(error: ValidationError) -> str:
    """Say what is wrong with a reading: the rule that it breaks, or a key and what that should be."""
    first = error.errors()[0]
    rule = first.get("ctx", {}).get("error")
    if isinstance(rule, PrflError):
        return f"{rule.where}: {rule.what}"
    return f"{READING}: {'.'.join(map(str, first['loc']))}: {first['msg']}"


def head_of(tensors: dict[str, Tensor]) -> nn.Module:
    """Build a head for its tensors: VideoAlign's one matrix, or HPSv3's three layers."""
    if "weight" in tensors:
        return nn.Linear(tensors["weight"].shape[1], len(tensors["weight"]), bias=False)
    sizes = [tensors[f"{number}.weight"].shape for number in (0, 3, 5) if f"{number}.weight" in tensors]
    if len(sizes) < 3:
        return nn.Identity()  # which takes no tensor: the caller says so
    first, second, third = (nn.Linear(inputs, outputs) for outputs, inputs in sizes)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(0.05), second, nn.ReLU(), third)


def untrained_parts(
    width: int, inner: int, heads: int, head: nn.Module, reading: Reading, words: int, dtype: Dtype
) -> tuple[Qwen2VLModel, nn.Module, Words, Reading]:
    """Make the parts of a reward on a Qwen2-VL of 28 layers, whose bytes are counted on ``meta``.

    words: tokens of the text around the pictures.
    """
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 151_936, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 28,
            "num_attention_heads": heads, "num_key_value_heads": heads // 6 if heads == 12 else 4,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": width, "num_heads": 16},
    )  # fmt: skip
    special = tuple(range(2, 2 + len(reading.tokens)))
    ids = [1, *[0] * (words - len(special)), *special]
    network = Qwen2VLModel(config).to(getattr(torch, dtype))
    return network, head, Words(lambda prompt: ids, 1, special), reading
