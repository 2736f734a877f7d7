"""A reward that the user wrote: what is tried before the first step, and that it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prfl.backbone.condition import Ask, Condition
from prfl.reward.own_function import load_own
from prfl.utils.errors import PrflError

MODULE = """
import torch

def sharpness(pixels, prompts, power=1):
    return pixels.diff(dim=-1).abs().pow(power).mean((1, 2, 3, 4))

def two(pixels, prompts):
    assert pixels.min() >= 0 and pixels.max() <= 1
    return {"light": pixels.mean((1, 2, 3, 4)), "words": pixels.std((1, 2, 3, 4)) * len(prompts[0])}

class Warm:
    def __init__(self, device, channel=0):
        self.channel = channel
    def __call__(self, pixels, prompts):
        return pixels[:, self.channel].mean((1, 2, 3))

def per_frame(pixels, prompts):
    return pixels.mean((1, 3, 4))

def by_numpy(pixels, prompts):
    return torch.tensor(pixels.detach().numpy().mean((1, 2, 3, 4)))

def rounded(pixels, prompts):
    return pixels.round().mean((1, 2, 3, 4))

def infinite(pixels, prompts):
    return 1 / (pixels.mean((1, 2, 3, 4)) * 0)

def broken(pixels, prompts):
    return pixels.no_such_thing()

class Turned(torch.autograd.Function):
    @staticmethod
    def forward(context, pixels):
        return pixels.mean((1, 2, 3, 4))
    @staticmethod
    def backward(context, gradient):
        return -gradient.view(-1, 1, 1, 1, 1).expand(2, 3, 5, 32, 32)

def turned(pixels, prompts):
    return Turned.apply(pixels)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, under a name of its own: python remembers modules."""
    name = f"rewards_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_functions_and_classes(module: str) -> None:
    pixels, condition = torch.rand(2, 3, 5, 8, 8) * 4 - 2, Condition({}, (Ask("ab"), Ask("c")))
    unit = (pixels / 2 + 0.5).clamp(0, 1)
    reward = load_own(f"{module}:sharpness", {"power": 2})
    assert reward.dimensions == ("sharpness",)
    expected = unit.diff(dim=-1).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(reward(pixels, condition)["sharpness"], expected)
    assert load_own(f"{module}:two").dimensions == ("light", "words")
    warm = load_own(f"{module}:Warm", {"channel": 2})
    torch.testing.assert_close(warm(pixels, condition)["Warm"], unit[:, 2].mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("per_frame", "'per_frame' is (2, 5) for 2 videos"),
        ("by_numpy", "no gradient comes back to the pixels"),
        ("rounded", "its gradient is zero"),
        ("infinite", "its scores are not finite"),
        ("broken", "it fails on a clip of 5 frames, 32 x 32: AttributeError"),
        ("absent", "cannot be imported: AttributeError"),
    ],
)
def test_what_cannot_be_followed_is_refused(module: str, function: str, message: str) -> None:
    with pytest.raises(PrflError) as caught:
        load_own(f"{module}:{function}")
    assert message in str(caught.value) and "reward.callable.function" in str(caught.value)


def test_other_refusals(module: str) -> None:
    with pytest.raises(PrflError, match="No module named 'nowhere_at_all'"):
        load_own("nowhere_at_all:x")
    with pytest.raises(PrflError, match="no installed package offers 'sharp'"):
        load_own("sharp")
    with pytest.raises(PrflError, match="cannot be made"):
        load_own(f"{module}:Warm", {"colour": 1})


def test_a_gradient_of_the_wrong_sign_is_warned_of(module: str, capsys: pytest.CaptureFixture) -> None:
    load_own(f"{module}:turned")
    assert "does not raise it" in capsys.readouterr().out.replace("\n", " ")
