"""Both recipes of Diffusion-DRF, yes or no and free answers, against one joint graph: chain, decoder, stock critic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prfl.backbone import Backbone
from prfl.objective.loss import RewardLoss
from prfl.objective.methods.vader import Vader
from prfl.objective.reward_gradient import RewardGradient
from prfl.reward.critic import CriticReward
from prfl.reward.questions import Question, Questions
from prfl.reward.scorer import PixelScorer
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.solvers import euler
from tests.critic import tiny_vlm, tiny_words
from tests.objective.parts import (
    PROMPTS,
    SHAPE,
    assert_same_gradients,
    joint_graph_chain,
    take_gradients,
    with_policy,
)
from tests.reward.test_critic import stock

STEPS, LAST = 4, 2
RECIPES = {
    "yes or no": [Question("colour", "is its colour red?", "yes"), Question("speed", "does it move quickly?", "no")],
    "free": [
        Question("look", "describe the video.", "a red circle moves left"),
        Question("shape", "what shape is it?", "circle"),
    ],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_equals_a_joint_graph(tiny_backbone: Backbone, recipe: str) -> None:
    questions = RECIPES[recipe]
    words = tiny_words()
    critic = CriticReward(tiny_vlm("qwen3_vl", words), words, Questions({"*": questions}), frames=4, seconds=2.0)
    weights = {questions[0].dimension: 1.0, questions[1].dimension: 0.5}
    objective = RewardGradient(
        with_policy(tiny_backbone), Vader(euler(chain_sigmas(STEPS, 3.0)), 0, LAST),
        PixelScorer(critic, tiny_backbone, seed=0, aggregate="logsigmoid"),
        RewardLoss(weights, aggregate="logsigmoid", shape="linear", scale=1.0), PROMPTS, SHAPE,
    )  # fmt: skip
    indices = [3, 4]
    x, _ = joint_graph_chain(objective, 0, indices, STEPS - LAST, STEPS)
    pixels = tiny_backbone.decode(x)
    chosen = critic.chosen(pixels.shape[2])
    loss: Tensor = torch.zeros(())
    for video in range(len(indices)):
        for question in questions:
            seen = pixels[video : video + 1, :, chosen]
            seconds = [2.0 * frame / (pixels.shape[2] - 1) for frame in chosen]
            loss = loss - weights[question.dimension] * stock(critic, seen, question, seconds) / len(indices)
    loss.backward()
    expected = take_gradients(objective)

    objective.accumulate(0, indices)
    assert_same_gradients(take_gradients(objective), expected)
