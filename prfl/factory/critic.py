"""The critic of a config: a vision-language model and its questions, or those inside the package."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import torch

from prfl.backbone.condition import texts
from prfl.config.sections.data import DataConfig
from prfl.factory.data import video_size
from prfl.factory.prompts import load_prompts
from prfl.reward import critic, critic_sizes
from prfl.reward.questions import Questions
from prfl.toy import clips as shapes
from prfl.toy.questions import all_questions

INSIDE = {"shapes": partial(all_questions, free=False), "shapes-answers": partial(all_questions, free=True)}


def critic_folder(model: str) -> str | Path:
    """A folder or a hub id; 'shapes' is the critic inside the package."""
    return shapes.critic_folder() if model == "shapes" else model


def find_questions(questions: str | None) -> Questions | str | None:
    """A file of questions; 'shapes' and 'shapes-answers' are those of the shapes world, of yes or no and free."""
    return INSIDE[questions]() if questions in INSIDE else questions


def load_critic(
    model: str, questions: str | None, frames: int, most_pixels: int, dtype: Literal["float32", "bfloat16"],
    revision: str | None, device: torch.device, data: DataConfig,
) -> critic.CriticReward:  # fmt: skip
    """A critic that is asked about the videos of all prompts of the run."""
    prompts = [prompt for part in load_prompts(data).values() for prompt in texts(part)]
    folder, asked = str(critic_folder(model)), find_questions(questions)
    return critic.load_critic(folder, asked, frames, most_pixels, dtype, revision, device, video_size(data), prompts)


def untrained_critic(
    model: str, questions: str | None, frames: int, most_pixels: int, dtype: Literal["float32", "bfloat16"]
) -> critic.CriticReward:
    return critic_sizes.untrained(str(critic_folder(model)), find_questions(questions), frames, most_pixels, dtype)
