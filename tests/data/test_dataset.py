from __future__ import annotations

import math

import pytest
import torch

from prfl.backbone import Condition
from prfl.backbone.wan.text import text_condition
from prfl.data.dataset import LatentDataset, preference_between

NAN = math.nan


def condition(value: float, tokens: int) -> Condition:
    return text_condition(torch.full((1, tokens, 2), value), torch.tensor([tokens]))


@pytest.fixture
def data() -> LatentDataset:
    return LatentDataset(
        latents=torch.arange(5.0)[:, None, None, None, None].expand(5, 2, 1, 2, 2),
        conditions={"": condition(0.0, 1), "x": condition(1.0, 2), "y": condition(2.0, 3)},
        prompts=["x", "y", "x", "x", "y"],
        device=torch.device("cpu"),
        skipped=[],
        video=torch.tensor([0, 1, 2, 3, 1]),
        labels={"motion": torch.tensor([1.0, 0.0, 0.0, NAN, 0.0]), "text": torch.tensor([0.2, 0.9, 0.2, 0.7, 0.3])},
    )


def test_preferences_compare_labels(data):
    motion = preference_between(data.labels["motion"][[0, 2, 3, 4]], data.labels["motion"][[2, 0, 0, 1]])
    assert motion[:2].tolist() == [1, 0] and motion[2].isnan() and motion[3] == 0.5


def test_a_video_may_be_labelled_for_two_prompts(data):
    batch = data.get([1, 4, 2])
    assert batch.latents[:, 0, 0, 0, 0].tolist() == [1, 1, 2] and batch.prompts == ["y", "y", "x"]
    assert batch.labels["text"].tolist() == pytest.approx([0.9, 0.3, 0.2])


def test_conditions_of_other_lengths_are_padded(data):
    batch = data.get([1, 0])
    assert batch.condition.tensors["prompt_embeds"].shape == (2, 3, 2)
    assert batch.condition.tensors["prompt_embeds"][1, :, 0].tolist() == [1, 1, 0]
    assert len(data.conditions[""]) == 1
