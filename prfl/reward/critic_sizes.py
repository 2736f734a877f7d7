"""The critics of published sizes on ``meta``, so that a dry run can count what they hold without their weights.

Sizes from the models' own config.json.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from prfl.backbone.condition import Condition
from prfl.reward.critic import FAMILIES, CriticReward
from prfl.reward.look import computed_again
from prfl.reward.public import FrozenReward
from prfl.reward.questions import EVERY, FITS, Questions, read_questions
from prfl.reward.qwen_look import QwenLook
from prfl.reward.scores import Scores

QWEN3_TOWERS: dict[str, dict[str, Any]] = {
    "small": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
    "large": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
}
QWEN3 = {  # name's part: width, layers, MLP, heads, keys' heads, tower, whether words are tied
    "2B": (2048, 28, 6144, 16, 8, "small", True),
    "4B": (2560, 36, 9728, 32, 8, "small", True),
    "8B": (4096, 36, 12288, 32, 8, "large", False),
    "32B": (5120, 64, 25600, 64, 8, "large", False),
}
QWEN2_5 = {  # name's part: width, layers, MLP, heads, keys' heads, whether words are tied
    "3B": (2048, 36, 11008, 16, 2, True),
    "7B": (3584, 28, 18944, 28, 4, False),
}
WORDS = 64  # of a question with its chat and answer; the video's tokens are many times as many


def config_of(model: str) -> Any:
    """Read the config in a folder, or make that of a published model by its name; the default critic's for others."""
    if Path(model).is_dir():
        return AutoConfig.from_pretrained(model)
    size = model.rpartition("/")[2].split("-")
    if (old := next((name for name in QWEN2_5 if name in size), None)) and "Qwen2.5" in size:
        width, layers, inner, heads, keys, tied = QWEN2_5[old]
        text = _text(width, layers, inner, heads, keys, tied)
        return Qwen2_5_VLConfig(text_config=text, vision_config={"out_hidden_size": width}, tie_word_embeddings=tied)
    new = next((name for name in QWEN3 if name in size), "4B")
    width, layers, inner, heads, keys, tower, tied = QWEN3[new]
    text = _text(width, layers, inner, heads, keys, tied) | {"head_dim": 128}
    vision = QWEN3_TOWERS[tower] | {"out_hidden_size": width, "num_heads": 16}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def _text(width: int, layers: int, inner: int, heads: int, keys: int, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": 151936, "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": keys, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 1e6},
    }  # fmt: skip


def untrained(
    model: str, questions: Questions | str | None = None, frames: int = 8, most_pixels: int = 200_704,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
) -> CriticReward:  # fmt: skip
    """Build a critic of a model's size, whose passes are counted on ``meta``.

    questions: of a file that is not there one is counted, as of null.
    """
    if isinstance(questions, str):
        questions = read_questions(questions) if Path(questions).is_file() else None
    config = config_of(model)
    network = FAMILIES[config.model_type](config).to(getattr(torch, dtype))
    return CountedCritic(network, questions or Questions({EVERY: [FITS]}), frames, most_pixels)


class CountedCritic(CriticReward):
    """A critic without a tokenizer: its sequences have the right length, and no words.

    Where a value decides a shape, as an index or a mask does, ``meta`` has none: those are made on the CPU.
    """

    def __init__(self, network: Any, questions: Questions, frames: int, most_pixels: int) -> None:
        FrozenReward.__init__(self, questions.dimensions, network)
        self.network, self.questions, self.frames = network, questions, frames
        self.look = QwenLook.of(network.config, most_pixels)

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        values, _ = self.look.seen(pixels[:, :, self.chosen(pixels.shape[2])])
        features = self.watched_on_meta(values.to(self.network.dtype), pixels)
        ask = partial(self.pass_through, batch=len(pixels))
        return {name: computed_again(ask, *features) for name in self.dimensions}

    def watched_on_meta(self, values: Tensor, pixels: Tensor) -> list[Tensor]:
        """Run the vision tower on patches of these pixels, its indices made beforehand."""
        rows, columns = self.look.size(*pixels.shape[3:])
        time = -(-len(self.chosen(pixels.shape[2])) // self.look.step)
        grid = torch.tensor([[time, rows // self.look.patch, columns // self.look.patch]] * len(pixels))
        tower = self.network.model.visual
        places: dict[str, Tensor] = {"position_ids": get_vision_position_ids(grid, self.look.merge)}
        if self.network.config.model_type == "qwen3_vl":
            indices, weights = get_vision_interpolation_indices_and_weights(
                grid, tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners,
                self.look.merge,
            )  # fmt: skip
            places |= {"interp_indices": indices, "interp_weights": weights}
        else:
            vision = self.network.config.vision_config
            window, bounds = get_vision_window_index(
                grid, self.look.merge, vision.window_size, vision.patch_size
            )  # fmt: skip
            places |= {"window_index": window}
        on_meta: dict[str, Any] = {name: tensor.to(values.device) for name, tensor in places.items()}
        if self.network.config.model_type == "qwen2_5_vl":
            on_meta["cu_window_seqlens"] = bounds
        output = tower(values, grid_thw=grid, return_dict=True, **on_meta)
        layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        return [layer.unflatten(0, (len(pixels), -1)) for layer in layers]

    def pass_through(self, *features: Float[Tensor, "b tokens w"], batch: int) -> Float[Tensor, " b"]:
        """Run the language model on the video's tokens and as many words as a question has."""
        words = torch.empty(batch, WORDS, features[0].shape[2], device=features[0].device, dtype=features[0].dtype)
        sequence = torch.cat([torch.stack(features).sum(0), words], dim=1)
        places = torch.empty(3, batch, sequence.shape[1], device=sequence.device, dtype=torch.long)
        hidden = self.network.model.language_model(inputs_embeds=sequence, position_ids=places, use_cache=False)
        return self.network.lm_head(hidden.last_hidden_state[:, -1:]).float().logsumexp((1, 2))
