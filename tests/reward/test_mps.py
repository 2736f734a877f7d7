"""MPS: its equations on its file's tensors, the aspects, and the refusal of a pickle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from prfl.reward.look import Look, frames_of, seen
from prfl.reward.mps import ASPECTS, load_mps
from prfl.utils.errors import PrflError
from tests.reward.test_aesthetic import SIZE, smooth
from tests.reward.tiny_rewards import mps_names, prompts, save_tiny_clip, tiny_mps, tiny_words


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Two heads of queries, one head of keys and values, by the equations."""
    split = query.unflatten(2, (2, 64)).permute(0, 2, 1, 3) / 8
    weights = (torch.einsum("nhid,njd->nhij", split, key) + mask).softmax(3)
    return torch.einsum("nhij,njd->nihd", weights, value).flatten(2)


def turned_by_complex_numbers(x: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(32) / 32)
    pairs = torch.complex(x[..., :32], x[..., 32:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=2)


def gated(x: torch.Tensor) -> torch.Tensor:
    values, gate = x.chunk(2, dim=2)
    return F.silu(gate) * values


def cross(tensors: dict[str, torch.Tensor], x: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    for layer in range(2):
        own = {name: value for name, value in tensors.items() if name.startswith(f"cross_model.layers.{layer}.")}
        first, second = (
            {name.split(".fn.")[1]: value for name, value in own.items() if name.split(".")[3] == which}
            for which in "01"
        )
        y = F.layer_norm(x, (128,), first["norm.weight"], first["norm.bias"])
        key, value = (words @ first["to_kv.weight"].T).chunk(2, dim=2)
        attended = attention(y @ first["to_q.weight"].T, key, value, mask) @ first["to_out.weight"].T
        x = x + attended + gated(y @ first["ff.0.weight"].T) @ first["ff.2.weight"].T

        y = F.layer_norm(x, (128,), second["norm.weight"], second["norm.bias"])
        query, key, value, inner = (y @ second["fused_attn_ff_proj.weight"].T).split([128, 64, 64, 1024], dim=2)
        query = torch.cat([turned_by_complex_numbers(head) for head in query.chunk(2, dim=2)], dim=2)
        attended = attention(query, turned_by_complex_numbers(key), value, torch.zeros(()))
        x = x + attended @ second["attn_out.weight"].T + gated(inner) @ second["ff_out.1.weight"].T
    return x


@torch.no_grad()
def test_score_is_that_of_its_equations(tmp_path: Path) -> None:
    clip, layers = tiny_mps()
    tensors, texts, pixels = mps_names(clip, layers), ["a color", "dog shape"], smooth(2, 3)
    save_file(tensors, tmp_path / "mps.safetensors")
    words = str(save_tiny_clip(tmp_path / "words"))
    reward = load_mps(tmp_path / "mps.safetensors", words)
    scores = reward(pixels, prompts(*texts))["mps"]

    def features(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = tiny_words()(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        states = clip.text_projection(clip.text_model(input_ids=ids).last_hidden_state)
        return states, states[torch.arange(len(ids)), (ids == 49).int().argmax(1)]

    text, ends = features(texts)
    condition, _ = features([ASPECTS["overall"]])
    likeness = torch.einsum("bid,bjd->bji", text, condition.expand(2, -1, -1)).amax(1)
    mask = torch.where(likeness / likeness.amax(1, keepdim=True) > 0.3, 0.0, float("-inf"))
    frames = seen(frames_of(pixels), Look(SIZE, "crop"))
    patches = clip.visual_projection(clip.vision_model(pixel_values=frames).last_hidden_state)
    x = cross(tensors, patches, text.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)[:, None, None])
    cosine = F.cosine_similarity(x[:, 0], ends.repeat_interleave(3, 0))
    torch.testing.assert_close(scores, clip.logit_scale.exp() * cosine.view(2, 3).mean(1), rtol=1e-4, atol=1e-4)

    assert 0 < int(mask.isinf().sum()) < mask.numel() / 2, "some tokens of the prompt are out of sight"
    other = load_mps(tmp_path / "mps.safetensors", words, aspect="quality")
    assert not torch.equal(other.read_prompts(texts)[2], reward.read_prompts(texts)[2]), "the aspect is read"
    swapped = reward(pixels, prompts(*reversed(texts)))["mps"]
    assert (swapped - scores).abs().min() > 1e-3, "the prompt is read"


def test_a_pickle_and_a_part_are_refused(tmp_path: Path) -> None:
    words = str(save_tiny_clip(tmp_path / "words"))
    torch.save(tiny_mps()[0], tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(PrflError, match="a pickled module, which runs code"):
        load_mps(tmp_path / "MPS_overall_checkpoint.pth", words)
    tensors = mps_names(*tiny_mps())
    del tensors["cross_model.layers.1.0.fn.to_q.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(PrflError, match="is not all of an MPS"):
        load_mps(tmp_path / "part.safetensors", words)


def test_aspects_have_their_own_words() -> None:
    assert ASPECTS["overall"].split(", ")[:7] == ASPECTS["aesthetics"].split(", ")
    assert ASPECTS["overall"].endswith("location, word, things") and len(ASPECTS["overall"].split(", ")) == 22
