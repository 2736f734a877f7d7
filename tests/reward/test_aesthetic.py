"""The aesthetic score against the plain path: pictures of 8 bits, transformers' own image processor, CLIPModel, MLP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, CLIPConfig, CLIPImageProcessor, CLIPModel

from prfl.backbone.wan.text import text_condition
from prfl.reward import look
from prfl.reward.aesthetic import AestheticMlp, AestheticReward, load_aesthetic, read_mlp
from prfl.reward.look import Look, seen
from prfl.utils.errors import PrflError

SIZE, WIDTH = 28, 24
SQUARE = Look(SIZE, mode="bilinear")
NO_PROMPT = text_condition(torch.zeros(2, 1, 4), torch.ones(2, dtype=torch.long))


def tiny_clip(seed: int = 0, projection_dim: int = WIDTH) -> CLIPModel:
    layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = CLIPModel(
            CLIPConfig(
                text_config={**layers, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1},
                vision_config={**layers, "image_size": SIZE, "patch_size": 14},
                projection_dim=projection_dim,
            )
        )
    with torch.no_grad():
        clip.vision_model.embeddings.patch_embedding.weight.mul_(30)  # a random one hardly looks at the picture
    return clip.eval()


def tiny_mlp(seed: int = 1, width: int = WIDTH) -> AestheticMlp:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mlp = AestheticMlp(width)
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            parameter.mul_(3 if name.endswith("weight") else 1)  # or all embeddings score nearly alike
    return mlp.eval()


def smooth(batch: int = 2, frames: int = 3, height: int = 40, width: int = 56, reach: float = 0.7) -> torch.Tensor:
    """Smooth pictures in [-reach, reach]; a float path and one through 8 bits agree on these, as on photographs."""
    coarse = torch.rand(batch, 3, frames, 5, 7, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return reach * torch.nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A CLIP folder and an MLP file as a user has them."""
    tiny_clip().save_pretrained(tmp_path / "clip")
    torch.save(tiny_mlp().state_dict(), tmp_path / "mlp.pth")
    return tmp_path / "clip", tmp_path / "mlp.pth"


def pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """Every frame of every video as an 8-bit picture."""
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).flatten(0, 1)
    return [Image.fromarray(np.ascontiguousarray(frame.numpy())) for frame in levels]


def processor() -> CLIPImageProcessor:
    square = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessor(size=square, do_center_crop=False, resample=Image.Resampling.BILINEAR)


@pytest.mark.parametrize("height, width", [(40, 56), (28, 28), (20, 24), (150, 101)])
def test_preprocessing_is_that_of_transformers(height: int, width: int) -> None:
    """To 1.5 levels of 255, each 0.0151 in normalised units: the path in 8 bits rounds three times."""
    pixels = smooth(1, 2, height, width)
    expected = processor()(pictures(pixels), return_tensors="pt")["pixel_values"]
    found = seen(pixels.transpose(1, 2).flatten(0, 1), SQUARE)
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=1.5 * 0.0152)


@pytest.mark.parametrize("height, width", [(40, 56), (20, 24), (150, 101)])
def test_resize_is_that_of_pillow(height: int, width: int) -> None:
    """Without the rounding to 8 bits the two agree to float32's own error, on noise as well as on smooth pictures."""
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = seen(noise, SQUARE)[0]
    for channel, mean, std, values in zip(noise[0], look.CLIP_MEAN, look.CLIP_STD, found, strict=True):
        resized = Image.fromarray((channel / 2 + 0.5).numpy()).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        torch.testing.assert_close(values, (torch.from_numpy(np.array(resized)) - mean) / std, rtol=0, atol=2e-5)


@torch.no_grad()
def test_value_is_that_of_the_plain_path(files: tuple[Path, Path]) -> None:
    """From the same network inputs to float32's error; from 8-bit pictures to a fiftieth of what frames differ by."""
    pixels = smooth()
    clip, mlp = tiny_clip(), tiny_mlp()

    def plain(inputs: torch.Tensor) -> torch.Tensor:
        """The score of each frame."""
        embeddings = clip.get_image_features(pixel_values=inputs).pooler_output
        x = embeddings / embeddings.norm(dim=1, keepdim=True)
        for layer in (0, 2, 4, 6, 7):
            x = torch.nn.functional.linear(x, mlp.layers[layer].weight, mlp.layers[layer].bias)
        return x[:, 0]

    reward, frames = load_aesthetic(*files), pixels.transpose(1, 2).flatten(0, 1)
    exact = plain(seen(frames, SQUARE))
    scores = reward(pixels, NO_PROMPT)
    assert scores.keys() == {"aesthetic"}
    torch.testing.assert_close(scores["aesthetic"], exact.view(2, 3).mean(1), rtol=0, atol=1e-5)
    rounded = plain(torch.as_tensor(processor()(pictures(pixels), return_tensors="pt")["pixel_values"]))
    assert exact.std() > 0.4
    torch.testing.assert_close(reward.score_frames(frames), rounded, rtol=0, atol=0.02)


def test_gradient_against_finite_differences() -> None:
    """Resize, CLIP, checkpointing over more than one group of frames, and the mean: all differentiated."""
    reward = AestheticReward(tiny_clip().double(), tiny_mlp().double())
    pixels = smooth(1, look.FRAMES_AT_ONCE + 1, 9, 11).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: reward(p, NO_PROMPT)["aesthetic"], (pixels,), fast_mode=True, atol=1e-7)
    (gradient,) = torch.autograd.grad(reward(pixels, NO_PROMPT)["aesthetic"].sum(), pixels)
    assert gradient.isfinite().all() and (gradient.abs().amax((0, 1, 3, 4)) > 0).all(), "every frame receives some"


def test_saturated_pixels_are_clamped_and_still_have_a_gradient() -> None:
    reward = AestheticReward(tiny_clip(), tiny_mlp())
    pixels = (5 * smooth()).requires_grad_()
    beyond = pixels.detach().abs() > 1
    assert beyond.float().mean() > 0.2
    score = reward(pixels, NO_PROMPT)["aesthetic"]
    torch.testing.assert_close(score, reward(pixels.detach().clamp(-1, 1), NO_PROMPT)["aesthetic"])
    score.sum().backward()
    assert (pixels.grad[beyond].abs() > 0).float().mean() > 0.9


def test_networks_are_frozen_and_few_activations_are_kept() -> None:
    reward = AestheticReward(tiny_clip(), tiny_mlp())
    networks = (reward.vision, reward.projection, reward.mlp)
    assert not any(parameter.requires_grad for network in networks for parameter in network.parameters())
    assert not any(module.training for network in networks for module in network.modules() if module.training)

    def kept(frames: int) -> int:
        """Bytes that the graph of a score holds."""
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += tensor.numel() * tensor.element_size()
            return tensor

        pixels = smooth(1, frames, SIZE, SIZE).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            reward(pixels, NO_PROMPT)
        return count

    pixel_bytes = 3 * SIZE * SIZE * 4
    assert kept(32) < 2 * 32 * pixel_bytes, "no activation of CLIP is kept for the backward pass"


def test_safetensors_is_read_too(files: tuple[Path, Path], tmp_path: Path) -> None:
    save_file(tiny_mlp().state_dict(), tmp_path / "mlp.safetensors")
    for name, values in read_mlp(tmp_path / "mlp.safetensors").state_dict().items():
        assert torch.equal(values, read_mlp(files[1]).state_dict()[name])


def mlp_faults() -> dict[str, tuple[object, str]]:
    """What is in the file, and what is said of it.  What no file of tensors may have is in test_refusals.py."""
    state = tiny_mlp().state_dict()
    half = {name: values for name, values in state.items() if not name.startswith("layers.7")}
    return {
        "no file of tensors": ([1.0], "holds no aesthetic MLP: it is no dictionary of tensors"),
        "another network": ({"weight": torch.zeros(2, 2)}, "no matrix 'layers.0.weight'"),
        "no matrix": ({**state, "layers.0.weight": torch.zeros(3)}, "no matrix 'layers.0.weight'"),
        "a layer is missing": (half, "layers.7.weight"),
        "another shape": ({**state, "layers.2.weight": torch.zeros(3, 3)}, "size mismatch"),
    }


@pytest.mark.parametrize("fault", mlp_faults())
def test_a_wrong_mlp_file_is_named(fault: str, tmp_path: Path) -> None:
    content, message = mlp_faults()[fault]
    path = tmp_path / "mlp.pth"
    torch.save(content, path)
    with pytest.raises(PrflError, match=message) as caught:
        read_mlp(path)
    assert caught.value.where == str(path) and "sac+logos+ava1-l14-linearMSE.pth" in str(caught.value)


def test_a_clip_of_another_width_does_not_fit(files: tuple[Path, Path]) -> None:
    tiny_clip(projection_dim=WIDTH + 8).save_pretrained(files[0])
    with pytest.raises(PrflError, match="embeddings of width 24, this CLIP's have 32"):
        load_aesthetic(*files)


def test_a_wrong_clip_folder_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Above all a folder whose missing weights transformers would leave at random values."""
    with pytest.raises(PrflError, match="there is no such folder") as caught:
        load_aesthetic(tmp_path / "nothing", files[1])
    assert caught.value.where == str(tmp_path / "nothing")
    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(PrflError, match="is no CLIPModel, or not all of one"):
        load_aesthetic(tmp_path / "bert", files[1])
    weights = files[0] / "model.safetensors"
    shutil.copy(weights, tmp_path / "whole")
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(PrflError, match="cannot load the CLIP"):
        load_aesthetic(*files)
    shutil.copy(tmp_path / "whole", weights)
    config = json.loads((files[0] / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 32
    (files[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(PrflError, match="cannot load the CLIP"):
        load_aesthetic(*files)


def test_pickled_clip_weights_are_not_loaded(files: tuple[Path, Path]) -> None:
    (files[0] / "model.safetensors").unlink()
    torch.save(tiny_clip().state_dict(), files[0] / "pytorch_model.bin")
    with pytest.raises(PrflError, match="cannot load the CLIP"):
        load_aesthetic(*files)
