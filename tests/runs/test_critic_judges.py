"""A critic as a judge: of finished videos (prfl score --critic), and beside a run that follows another reward."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prfl import cli
from prfl.backbone import Backbone
from prfl.config import load_config
from prfl.data.video import write_video
from prfl.evaluation.reward_eval import decoded_prediction
from prfl.factory.evaluation import watched_rewards
from prfl.reward.critic import load_critic
from prfl.reward.questions import write_questions
from prfl.toy.questions import all_questions
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize
from tests.critic import QUESTIONS, tiny_vlm, tiny_words

VADER = Path(__file__).parents[2] / "configs/tiny/vader.yaml"
PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved critic, its questions and a video."""
    folder = tmp_path_factory.mktemp("critic")
    words = tiny_words()
    tiny_vlm("qwen3_vl", words).save_pretrained(folder / "vlm")
    words.save_pretrained(folder / "vlm")
    write_questions(folder / "q.jsonl", QUESTIONS)
    write_video(folder / "a.mp4", torch.rand(3, 5, 16, 16) * 2 - 1, 4)
    return folder


def test_finished_videos_are_scored_without_a_video_model(folder: Path, capsys: pytest.CaptureFixture) -> None:
    command = [
        "score", str(folder / "a.mp4"), "--critic", str(folder / "vlm"), "--questions", str(folder / "q.jsonl"),
        "--prompt", PROMPT, "--device", "cpu",
    ]  # fmt: skip
    assert cli.main(command) == 2
    assert "give --frames, --height, --width, --fps" in capsys.readouterr().err

    assert cli.main([*command, "--frames", "5", "--height", "16", "--width", "16", "--fps", "4"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert list(row) == ["file", "sample", "prompt", "sigma", *QUESTIONS.dimensions]
    assert float(row["colour"]) != 0 and float(row["look"]) == 0, "it is not asked of this prompt"

    assert cli.main([*command, "--sigmas", "0,0.5"]) == 2
    assert "without noise" in capsys.readouterr().err


def test_a_critic_watches_a_run_that_follows_another_reward(folder: Path, tiny_backbone: Backbone) -> None:
    critic = f"evaluation.held_out_critic={{model: {folder / 'vlm'}, questions: shapes, dtype: float32}}"
    config = load_config(VADER, ["reward.path=shapes", critic])
    (name, scorer), *others = watched_rewards(config, tiny_backbone, None).items()
    latents, sigma = torch.randn(1, 4, 3, 4, 4), torch.full((1,), 0.3)
    condition = tiny_backbone.condition([f"{PROMPT} slowly"])
    with torch.no_grad():
        scores = scorer(latents, sigma, condition)
        pixels = decoded_prediction(tiny_backbone, latents, sigma, condition)
        alone = load_critic(str(folder / "vlm"), all_questions(), clip=VideoSize(17, 32, 32, 8))
        expected = sum(F.logsigmoid(values) for values in alone(pixels, condition).values())
    torch.testing.assert_close(scores["total"], expected)
    assert name == "held_out" and not others

    with pytest.raises(PrflError, match="take one of the two"):
        load_config(VADER, ["reward.path=shapes", critic, "evaluation.held_out_reward=shapes-second"])
