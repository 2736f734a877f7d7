"""ImageReward: its file under the published names, its equations, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from prfl.reward.image_reward import load_image_reward
from prfl.reward.look import Look, frames_of, seen
from prfl.utils.errors import PrflError
from tests.reward.test_aesthetic import SIZE, smooth
from tests.reward.tiny_rewards import image_reward_names, prompts, save_tiny_clip, tiny_image_reward, tiny_words


def image_side(tensors: dict[str, torch.Tensor], frames: torch.Tensor) -> torch.Tensor:
    """BLIP's image side by the equations of its public code, on the file's tensors."""
    own = {name.removeprefix("blip.visual_encoder."): value for name, value in tensors.items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"], eps=1e-6)

    patches = F.conv2d(frames, own["patch_embed.proj.weight"], own["patch_embed.proj.bias"], stride=14)
    x = torch.cat([own["cls_token"].expand(len(frames), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + own["pos_embed"]
    for layer in range(2):
        block = f"blocks.{layer}"
        packed = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(2, (3, 2, 64))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        attended = (query @ key.mT / 8).softmax(3) @ value
        x = x + linear(attended.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return norm(x, "norm")


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_published_file_gives_the_published_equations(tmp_path: Path, suffix: str) -> None:
    """The first text token, which attended to the picture; each video beside its own prompt; the mean over frames."""
    vision, text, mlp = tiny_image_reward()
    tensors, texts, pixels = image_reward_names(vision, text, mlp), ["a dog runs", "a cat"], smooth(2, 3)
    path = tmp_path / f"ImageReward.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    reward = load_image_reward(path, str(save_tiny_clip(tmp_path / "words")))
    scores = reward(pixels, prompts(*texts))["imagereward"]

    patches = image_side(tensors, seen(frames_of(pixels), Look(SIZE, "crop")))
    words = tiny_words()(texts, padding="max_length", max_length=35, return_tensors="pt", return_token_type_ids=False)
    each = {name: values.repeat_interleave(3, 0) for name, values in words.items()}
    first = text(**each, encoder_hidden_states=patches, is_decoder=False).last_hidden_state[:, 0]
    expected = (mlp(first) - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(scores, expected.view(2, 3).mean(1), rtol=1e-4, atol=1e-4)
    assert (reward(pixels, prompts(*reversed(texts)))["imagereward"] - scores).abs().min() > 1e-3, "the prompt is read"
    assert (reward(-pixels, prompts(*texts))["imagereward"] - scores).abs().min() > 1e-3, "the picture is seen"


def test_what_is_no_image_reward_is_refused(tmp_path: Path) -> None:
    words = str(save_tiny_clip(tmp_path / "words"))
    tensors = image_reward_names(*tiny_image_reward())
    broken = {**tensors, "mlp.layers.0.bias": torch.full((1024,), float("nan"))}
    del tensors["blip.visual_encoder.norm.bias"]
    contents = {
        "is not all of an ImageReward": tensors, "layers.0.bias is not finite": broken,
        "cannot be read as an ImageReward": tiny_image_reward()[2], "it is no dictionary of tensors": [1],
    }  # fmt: skip
    for message, content in contents.items():
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(PrflError, match=message):
            load_image_reward(tmp_path / "x.pt", words)
