"""The protocol that every family implements: Wan does, and so does a toy that inherits nothing."""

from __future__ import annotations

import pytest
import torch

from prfl.backbone import Ask, Backbone, Condition
from prfl.backbone.base import Text
from prfl.backbone.wan.model import WanBackbone
from prfl.utils.errors import PrflError
from tests.objective.toy import ToyBackbone

MEMBERS = {name for name in [*vars(Backbone), *Backbone.__annotations__] if not name.startswith("_")}


def test_wan_and_a_toy_that_inherits_nothing_are_backbones(tiny_backbone: WanBackbone) -> None:
    assert ToyBackbone.__mro__[1:] == (object,)
    for backbone in (ToyBackbone(), tiny_backbone):
        assert isinstance(backbone, Backbone) and isinstance(backbone.text, Text)
    assert not isinstance(object(), Backbone)


def test_it_has_at_most_15_members() -> None:
    assert {"facts", "networks", "velocity", "parameters"} <= MEMBERS and len(MEMBERS) <= 15, sorted(MEMBERS)


def test_a_condition_carries_what_it_was_made_of(tiny_backbone: WanBackbone) -> None:
    condition = tiny_backbone.condition(["a red circle", Ask("a")])
    assert condition.asks == (Ask("a red circle"), Ask("a"))
    assert condition[[1, 1]].asks == (Ask("a"), Ask("a")) and condition[torch.tensor([False, True])].asks == (Ask("a"),)
    with pytest.raises(AssertionError, match="2 asks"):
        Condition({"text": torch.zeros(3, 1)}, condition.asks)


def test_only_ragged_tensors_are_padded() -> None:
    def one(tokens: int, ragged: frozenset[str]) -> Condition:
        return Condition({"text": torch.ones(1, tokens, 2)}, (Ask(str(tokens)),), ragged)

    both = Condition.cat([one(1, frozenset({"text"})), one(3, frozenset({"text"}))])
    assert both.tensors["text"].sum((1, 2)).tolist() == [2, 6] and both.tensors["text"].shape == (2, 3, 2)
    with pytest.raises(RuntimeError):
        Condition.cat([one(1, frozenset()), one(3, frozenset())])


def test_wan_takes_no_first_frame(tiny_backbone: WanBackbone, tmp_path) -> None:
    with pytest.raises(PrflError, match="no first frame"):
        tiny_backbone.condition([Ask("a", image=tmp_path / "a.png")])
