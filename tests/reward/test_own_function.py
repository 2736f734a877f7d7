"""A reward that the user wrote: what is tried before the first step, and that it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prfl import cli
from prfl.backbone import Backbone
from prfl.backbone.condition import Ask, Condition
from prfl.config import load_config
from prfl.config.own_code import source_of
from prfl.factory.evaluation import watched_rewards
from prfl.reward.own_function import load_own
from prfl.utils.errors import PrflError
from tests.faults.project import make_project

REPOSITORY = Path(__file__).parents[2]
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


def test_a_judge_needs_no_gradient(module: str) -> None:
    """Its scores are asked for without one, so that numpy will do; shapes and numbers are tried as ever."""
    judge = load_own(f"{module}:by_numpy", differentiable=False, where="evaluation.held_out_callable")
    pixels = torch.rand(2, 3, 5, 8, 8, requires_grad=True)
    scores = judge(pixels, Condition({}, (Ask("a"), Ask("b"))))["by_numpy"]
    assert not judge.differentiable and not scores.requires_grad and scores.dtype == torch.float32
    torch.testing.assert_close(scores, (pixels / 2 + 0.5).mean((1, 2, 3, 4)).detach())
    with pytest.raises(PrflError, match="evaluation.held_out_callable.function: 'per_frame' is"):
        load_own(f"{module}:per_frame", differentiable=False, where="evaluation.held_out_callable")


def test_a_gradient_method_refuses_a_judge(module: str) -> None:
    own = f"reward={{space: pixel, shape: linear, callable: {{function: '{module}:rounded', differentiable: false}}}}"
    vader = str(REPOSITORY / "configs/tiny/vader.yaml")
    with pytest.raises(PrflError, match="objective vader follows the gradient of its reward, and this one"):
        load_config(vader, [own])
    with pytest.raises(PrflError, match="steering.guidance follows the gradient of its reward"):
        load_config(vader, [own, "steering={name: guidance}"])
    assert load_config(vader, [own, "steering={name: best_of}"]).reward


def test_a_function_watches_a_run(module: str, tiny_backbone: Backbone) -> None:
    judge = f"evaluation.held_out_callable={{function: '{module}:rounded'}}"
    config = load_config(REPOSITORY / "configs/tiny/vader.yaml", ["reward.path=shapes", judge, "evaluation.every=5"])
    (scorer,) = watched_rewards(config, tiny_backbone, None).values()
    condition = tiny_backbone.condition(["a dog"])
    with torch.no_grad():
        scores = scorer(torch.randn(1, 4, 3, 4, 4), torch.full((1,), 0.3), condition)
    assert 0 < float(scores["total"]) < 1
    with pytest.raises(PrflError, match="evaluation.held_out_callable: evaluation.held_out_reward watches already"):
        load_config(REPOSITORY / "configs/tiny/vader.yaml", ["evaluation.held_out_reward=shapes-second", judge])


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


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pictures")
def test_a_run_does_not_resume_with_another_source(
    module: str, tiny_pipeline_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    """The hash of the function's file is part of a run's identity: the same file resumes, another one is refused."""
    make_project(tiny_pipeline_folder)
    own = f"reward={{space: pixel, shape: linear, callable: {{function: '{module}:sharpness'}}}}"

    def train(steps: int) -> int:
        return cli.main(["train", "vader.yaml", own, f"training.steps={steps}", "evaluation.every=0"])

    assert train(1) == 0
    source = Path(f"{module}.py")
    source.write_text(MODULE.replace("diff(dim=-1)", "diff(dim=-2)"))
    capsys.readouterr()
    assert train(2) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "what the config names has changed since" in message
    assert "reward.callable.function (content)" in message and "or train in another run folder" in message
    source.write_text(MODULE)
    assert train(2) == 0


def test_an_installed_package_offers_a_reward(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an entry point of the group prfl.rewards, as pip writes it: its name alone is the function."""
    info = tmp_path / "sharp_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sharp-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[prfl.rewards]\nsharp = {module}:sharpness\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_own("sharp").dimensions == ("sharp",)
    assert source_of("sharp") == tmp_path / f"{module}.py"
