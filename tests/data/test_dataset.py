from __future__ import annotations

import math

import pytest
import torch

from prfl.backbone import Condition
from prfl.data.dataset import LatentDataset, pairs_within_prompt
from prfl.errors import PrflError

NAN = math.nan


def condition(value: float, tokens: int) -> Condition:
    return Condition(torch.full((1, tokens, 2), value), torch.tensor([tokens]))


@pytest.fixture
def data() -> LatentDataset:
    return LatentDataset(
        latents=torch.arange(5.0)[:, None, None, None, None].expand(5, 2, 1, 2, 2),
        conditions={"": condition(0.0, 1), "x": condition(1.0, 2), "y": condition(2.0, 3)},
        prompts=["x", "y", "x", "x", "y"],
        device=torch.device("cpu"),
        skipped=[],
        labels={"motion": torch.tensor([1.0, 0.0, 0.0, NAN, 0.0]), "text": torch.tensor([0.2, 0.9, 0.2, 0.7, 0.3])},
    )


def test_pairs_are_better_then_worse_of_one_prompt(data):
    assert data.pairs("motion").tolist() == [[0, 2]]
    assert sorted(data.pairs("text").tolist()) == [[1, 4], [3, 0], [3, 2]]
    with pytest.raises(PrflError, match="did you mean 'motion'"):
        data.pairs("motoin")


def test_no_pairs_keeps_the_shape():
    pairs = pairs_within_prompt({"m": torch.ones(3)}, ["x", "x", "y"], "m")
    assert pairs.shape == (0, 2) and pairs.dtype == torch.long


def test_pair_batches_compare_labels(data):
    batch = data.get_pairs(torch.tensor([[0, 2], [2, 0], [3, 0], [4, 1]]))
    assert batch.latents_a[:, 0, 0, 0, 0].tolist() == [0, 2, 3, 4]
    assert batch.latents_b[:, 0, 0, 0, 0].tolist() == [2, 0, 0, 1]
    assert batch.preference["motion"][:2].tolist() == [1, 0] and batch.preference["motion"][2].isnan()
    assert batch.preference["motion"][3] == 0.5
    assert batch.preference["text"].tolist() == [0.5, 0.5, 1, 0]
    assert batch.prompts == ["x", "x", "x", "y"]
    assert batch.condition.lengths.tolist() == [2, 2, 2, 3]


def test_a_pair_of_two_prompts_is_a_fault_of_ours(data):
    with pytest.raises(AssertionError, match="one prompt"):
        data.get_pairs(torch.tensor([[0, 1]]))


def test_conditions_of_other_lengths_are_padded(data):
    batch = data.get([1, 0])
    assert batch.condition.prompt_embeds.shape == (2, 3, 2)
    assert batch.condition.prompt_embeds[1, :, 0].tolist() == [1, 1, 0]
    assert len(data.empty_condition) == 1
