"""Public rewards on tiny random networks: finite differences, and the known traps of each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from prfl.reward import hpsv3, image_reward, mps, videoalign
from prfl.reward.look import Look, evenly_spaced, frames_of, seen
from prfl.reward.open_clip import read_open_clip, renamed
from prfl.reward.text_match import load_clip, load_hps, load_pickscore, untrained
from prfl.reward.watched import (
    CoherenceReward,
    ObjectReward,
    load_action,
    load_object,
    untrained_action,
    untrained_coherence,
    untrained_object,
)
from prfl.utils.errors import PrflError
from tests.reward.test_aesthetic import SIZE, smooth, tiny_clip
from tests.reward.tiny_rewards import (
    LAYERS,
    all_rewards,
    open_clip_names,
    prompts,
    save_tiny_clip,
    seeded,
    tiny_videomae,
    tiny_vjepa,
    tiny_words,
    tiny_yolos,
)


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    return save_tiny_clip(tmp_path / "clip")


# Gradients.


@pytest.mark.parametrize("name", all_rewards())
def test_gradient_against_a_finite_difference(name: str) -> None:
    """Along a random direction, with pixels away from both clamps; every frame that is read receives some."""
    reward = all_rewards()[name]()
    generator = torch.Generator().manual_seed(1)
    frames = 8 if name == "coherence" else 5
    pixels = ((torch.rand(2, 3, frames, 30, 40, generator=generator).double() * 2 - 1) * 0.3).requires_grad_()
    condition = prompts("a dog runs", "a cat")

    def total(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([score.sum() for score in reward(values, condition).values()]).sum()

    (gradient,) = torch.autograd.grad(total(pixels), pixels)
    direction = torch.randn(pixels.shape, generator=generator).double()
    step = 3e-3 if name in ("videoalign", "hpsv3") else 1e-4  # transformers turns the tower's places in float32
    with torch.no_grad():
        expected = (total(pixels + step * direction) - total(pixels - step * direction)) / (2 * step)
    # Central differences err by step^2 times the third derivative; L1's kinks are rare in 8 frames' features.
    assert expected.abs() > 1e-6
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-3, atol=1e-8)
    read = evenly_spaced(frames, 4) if name in ("action", "videoalign") else range(frames)
    assert all(gradient[:, :, frame].abs().amax() > 0 for frame in read)


@pytest.mark.slow
def test_published_sizes_are_counted_on_meta() -> None:
    """Forward and backward, without a look into a tensor; one layer of each kind tells as much as all."""
    kinds = (
        untrained_object, untrained_action, untrained_coherence, partial(untrained, "hps"), image_reward.untrained,
        mps.untrained, videoalign.untrained, hpsv3.untrained,
    )  # fmt: skip
    for kind in kinds:
        with torch.device("meta"):
            reward, pixels = kind(), torch.rand(1, 3, 2, 64, 64, requires_grad=True)
            for module in [module for network in reward.networks for module in network.modules()]:
                for name, layers in module.named_children():
                    if isinstance(layers, torch.nn.ModuleList) and len(layers) > 4:
                        setattr(module, name, layers[:1])
            scores = reward(pixels, prompts(""))
            (gradient,) = torch.autograd.grad(torch.stack(list(scores.values())).sum(), pixels)
        assert gradient.shape == pixels.shape


# CLIP, PickScore, HPS.


@torch.no_grad()
def test_clip_score_is_that_of_transformers(clip_folder: Path) -> None:
    """Each video beside its own prompt, which VADER's code got wrong; the mean over frames."""
    texts, pixels = ["a dog runs", "a cat"], smooth(2, 3)
    clip = CLIPModel.from_pretrained(clip_folder)
    words = tiny_words()(texts, padding="max_length", max_length=77, return_tensors="pt", return_token_type_ids=False)
    output = clip(pixel_values=seen(frames_of(pixels), Look(SIZE, "crop")), **words)
    cosine = (output.image_embeds @ output.text_embeds.T).view(2, 3, 2).mean(1).diagonal()
    scores = load_clip(str(clip_folder))(pixels, prompts(*texts))
    torch.testing.assert_close(scores["clip"], 100 * cosine, rtol=1e-5, atol=1e-4)
    picks = load_pickscore(str(clip_folder))(pixels, prompts(*texts))
    torch.testing.assert_close(picks["pickscore"], clip.logit_scale.exp() * cosine, rtol=1e-5, atol=1e-4)
    swapped = load_clip(str(clip_folder))(pixels, prompts(*reversed(texts)))
    assert (swapped["clip"] - scores["clip"]).abs().min() > 1e-3, "the prompt is read"


def test_a_prompt_that_is_cut_is_said(clip_folder: Path, capsys: pytest.CaptureFixture) -> None:
    load_clip(str(clip_folder))(smooth(2, 1), prompts("a dog " * 50, "a cat"))
    assert "the end of 1 of 2 is not read" in capsys.readouterr().out.replace("\n", " ")


def packed_attention(
    x: torch.Tensor, tensors: dict[str, torch.Tensor], name: str, heads: int, mask: Any
) -> torch.Tensor:
    """A layer of open_clip by torch's own packed attention."""

    def norm(values: torch.Tensor, which: str) -> torch.Tensor:
        return F.layer_norm(values, values.shape[-1:], tensors[f"{name}{which}.weight"], tensors[f"{name}{which}.bias"])

    y = norm(x, "ln_1").transpose(0, 1)
    attended, _ = F.multi_head_attention_forward(
        y, y, y, y.shape[2], heads, tensors[f"{name}attn.in_proj_weight"], tensors[f"{name}attn.in_proj_bias"], None,
        None, False, 0.0, tensors[f"{name}attn.out_proj.weight"], tensors[f"{name}attn.out_proj.bias"], attn_mask=mask,
        need_weights=False,
    )  # fmt: skip
    x = x + attended.transpose(0, 1)
    inner = F.gelu(F.linear(norm(x, "ln_2"), tensors[f"{name}mlp.c_fc.weight"], tensors[f"{name}mlp.c_fc.bias"]))
    return x + F.linear(inner, tensors[f"{name}mlp.c_proj.weight"], tensors[f"{name}mlp.c_proj.bias"])


@torch.no_grad()
def test_open_clip_weights_give_open_clip_embeddings(tmp_path: Path, clip_folder: Path) -> None:
    """Against open_clip's own equations, written with torch's packed attention on the file's tensors."""
    wide = {**LAYERS, "hidden_size": 128, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config={**wide, "vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49},
        vision_config={**wide, "image_size": SIZE, "patch_size": 14}, projection_dim=24,
    )  # fmt: skip
    tensors = open_clip_names(seeded(lambda: CLIPModel(config)))
    torch.save({"state_dict": {**tensors, "attn_mask": torch.zeros(3, 3)}}, tmp_path / "hps.pt")
    clip = read_open_clip(tmp_path / "hps.pt")

    frames = seen(frames_of(smooth(1, 2)), Look(SIZE, "pad"))
    patches = F.conv2d(frames, tensors["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = (
        torch.cat([tensors["visual.class_embedding"].expand(2, 1, -1), patches], 1)
        + tensors["visual.positional_embedding"]
    )
    x = F.layer_norm(x, (128,), tensors["visual.ln_pre.weight"], tensors["visual.ln_pre.bias"])
    for layer in range(2):
        x = packed_attention(x, tensors, f"visual.transformer.resblocks.{layer}.", 2, None)
    image = F.layer_norm(x[:, 0], (128,), tensors["visual.ln_post.weight"], tensors["visual.ln_post.bias"])
    torch.testing.assert_close(
        clip.visual_projection(clip.vision_model(pixel_values=frames).pooler_output), image @ tensors["visual.proj"],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip

    ids = torch.tensor([[44, 45, 46, 49, 49], [44, 47, 49, 49, 49]])
    x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"][:5]
    mask = torch.full((5, 5), float("-inf")).triu(1)
    for layer in range(2):
        x = packed_attention(x, tensors, f"transformer.resblocks.{layer}.", 2, mask)
    x = F.layer_norm(x, (128,), tensors["ln_final.weight"], tensors["ln_final.bias"])
    text = x[torch.arange(2), ids.argmax(1)] @ tensors["text_projection"]
    found = clip.text_projection(clip.text_model(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output)
    torch.testing.assert_close(found, text, rtol=1e-4, atol=1e-5)

    save_file(tensors, tmp_path / "hps.safetensors")
    reward = load_hps(tmp_path / "hps.safetensors", str(clip_folder))
    assert reward.look == Look(SIZE, "pad") and reward(smooth(2, 2), prompts("a dog", "a cat"))["hps"].abs().max() <= 1


def test_what_is_no_open_clip_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(PrflError, match="holds no CLIP in open_clip's names"):
        read_open_clip(tmp_path / "x.pt")
    torch.save(tiny_clip(), tmp_path / "module.pt")
    with pytest.raises(PrflError, match="cannot be read as a CLIP"):
        read_open_clip(tmp_path / "module.pt")
    tensors = open_clip_names(tiny_clip())
    del tensors["ln_final.bias"]
    torch.save(tensors, tmp_path / "part.pt")
    with pytest.raises(PrflError, match="is not all of a CLIP"):
        read_open_clip(tmp_path / "part.pt")
    assert "visual_projection.weight" in renamed(open_clip_names(tiny_clip()))


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, clip_folder: Path) -> None:
    save_file(open_clip_names(tiny_clip()), tmp_path / "hps.safetensors")
    (clip_folder / "tokenizer.json").unlink()
    with pytest.raises(PrflError, match="cannot load the tokenizer") as caught:
        load_hps(tmp_path / "hps.safetensors", str(clip_folder))
    assert caught.value.where == str(clip_folder) and "tokenizer.json too" in str(caught.value)


# Objects, actions, coherence.


def test_an_unlikely_object_has_a_gradient_and_labels_are_by_name(tmp_path: Path) -> None:
    network = tiny_yolos()
    with torch.no_grad():
        network.class_labels_classifier.layers[-1].bias[1] = -12.0  # no detection says "Dog"
    reward, pixels = ObjectReward(network, ["DOG"], ["Dog"]), smooth(1, 2).requires_grad_()
    scores = reward(pixels, prompts("x"))
    assert scores["DOG"] < -8 and -1e-3 < scores["no Dog"] < 0
    (gradient,) = torch.autograd.grad(scores["DOG"].sum(), pixels)
    assert gradient.abs().max() > 1e-6
    network.save_pretrained(tmp_path / "yolos")
    with pytest.raises(PrflError, match="the model knows no 'dogs'") as caught:
        load_object(str(tmp_path / "yolos"), ["dogs"])
    assert "Dog" in str(caught.value)


def test_action_is_the_log_probability_of_its_label(tmp_path: Path) -> None:
    network = tiny_videomae()
    network.save_pretrained(tmp_path / "videomae")
    reward, pixels = load_action(str(tmp_path / "videomae"), "sleeping"), smooth(2, 4, 16, 16)
    inputs = seen(frames_of(pixels), reward.look).unflatten(0, (2, 4))
    expected = network(pixel_values=inputs).logits.softmax(1)[:, 2]
    torch.testing.assert_close(reward(pixels, prompts("", ""))["action"].exp(), expected)


def test_coherence_is_predicted_without_a_look_at_the_future() -> None:
    """Another second half changes the truth that is compared with, and not the prediction."""
    reward, predictions = CoherenceReward(tiny_vjepa(), frames=8), []
    predictor = reward.network.predictor.forward

    def watch(*arguments: Any, **options: Any) -> Any:
        output = predictor(*arguments, **options)
        predictions.append(output.last_hidden_state)
        return output

    reward.network.predictor.forward = watch  # type: ignore[method-assign]
    pixels = smooth(1, 8)
    other = torch.cat([pixels[:, :, :4], smooth(1, 8, reach=0.3)[:, :, 4:].flip(3)], dim=2)
    first, second = (reward(video, prompts("x"))["coherence"] for video in (pixels, other))
    torch.testing.assert_close(predictions[0], predictions[1], rtol=0, atol=0)
    assert first != second
    with pytest.raises(PrflError, match="10 frames are not two halves"):
        CoherenceReward(tiny_vjepa(), frames=10)
