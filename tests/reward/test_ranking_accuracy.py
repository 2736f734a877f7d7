"""Which heads are said to be no better than chance."""

from __future__ import annotations

import json
import shlex

import yaml

from prfl.reward import RewardCard
from prfl.reward.ranking_accuracy import advice, doubts, levels_at_chance
from prfl.toy import clips as shapes


def card(accuracy, low=None, pairs=None):
    given = {"accuracy": {"light": accuracy}}
    given |= {"accuracy_low": {"light": low}} if low else {}
    return RewardCard(**given, **({"pairs": {"light": pairs}} if pairs else {}))


def test_a_shuffled_or_inverted_head_is_named_with_levels_and_pairs():
    shuffled = card({"0-0.2": 0.49, "0.2-0.4": 0.18, "0.4-0.5": 0.4, "0.5-0.6": 0.45, "0.95-0.975": 0.2}, pairs=48)
    (line,) = doubts(shuffled, ["light"])
    assert "0.49 at sigma 0-0.2, 0.18 at sigma 0.2-0.4, 0.40 at sigma 0.4-0.5 and 1 levels more (48 pairs)" in line


def test_a_good_head_is_not_doubted_whatever_it_says_of_noise():
    good = card({"0-0.2": 0.8, "0.4-0.5": 0.7, "0.8-0.85": 0.55, "0.99-1": 0.44}, {"0-0.2": 0.7, "0.4-0.5": 0.6}, 90)
    assert not doubts(good, ["light"])


def test_an_interval_around_chance_or_a_handful_of_pairs_is_no_knowledge():
    assert levels_at_chance(card({"0-0.2": 0.6}, {"0-0.2": 0.48}, 500), "light") == ["0-0.2"]
    assert levels_at_chance(card({"0-0.2": 0.8}, {"0-0.2": 0.8}, 5), "light") == ["0-0.2"]
    assert not levels_at_chance(card({"0-0.2": 0.6}, {"0-0.2": 0.55}, 500), "light")


def test_a_middle_level_is_named_only_where_it_is_not_above_chance():
    assert levels_at_chance(card({"0.6-0.7": 0.5}, {"0.6-0.7": 0.4}, 100), "light") == ["0.6-0.7"]
    assert not levels_at_chance(card({"0.6-0.7": 0.52}, {"0.6-0.7": 0.4}, 100), "light")


def test_what_was_never_measured_is_said():
    assert doubts(RewardCard(), ["light", "calm"]) == [
        "nobody knows whether it beats chance: never measured on held-out labels: light, calm"
    ]
    assert "calm" in doubts(card({"0-0.2": 0.9}), ["light", "calm"])[0]


def test_the_reward_inside_the_package_is_not_doubted():
    saved = json.loads((shapes.reward_folder() / "config.json").read_text())
    ranges = {name: tuple(value) for name, value in saved["card"].items() if isinstance(value, list)}
    inside = RewardCard(**{**saved["card"], **ranges})
    assert not doubts(inside, list(saved["normalisation"]["mean"]))


def test_what_ranks_is_named_with_the_weights_to_follow_it():
    accuracy = {"light": {"0-0.2": 0.9}, "it's calm": {"0-0.2": 0.8}, "size": {"0-0.2": 0.5}}
    measured = RewardCard(accuracy=accuracy, pairs=dict.fromkeys(accuracy, 400))
    told = advice(measured, {"light": 1.0, "it's calm": 0.5, "size": 1.0, "never measured": 1.0})
    assert told.startswith("follow light, it's calm: ")
    (argument,) = shlex.split(told.removeprefix("follow light, it's calm: "))
    key, _, value = argument.partition("=")
    assert (key, yaml.safe_load(value)) == ("reward.weights", {"light": 1.0, "it's calm": 0.5})
    assert "none of them is worth following yet" in advice(measured, {"size": 1.0})
