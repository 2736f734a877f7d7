"""What can be asked of the shapes world's videos, and what the oracle answers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from prfl.reward.questions import Question, Questions
from prfl.toy.oracle import DIMENSIONS
from prfl.toy.renderer import ATTRIBUTES, Attributes, split_prompts

YES_OR_NO = {
    "shape": "is the shape a {}?",
    "colour": "is its colour {}?",
    "direction": "does it move {}?",
    "speed": "does it move {}?",
    "steadiness": "does it move steadily?",
}
FREE = {
    "shape": "what shape is it?",
    "colour": "what colour is it?",
    "direction": "where does it move?",
    "speed": "how fast does it move?",
    "steadiness": "how steady is it?",
}
STEADY = {True: "steadily", False: "unsteadily"}
UNCLEAR = "unclear"  # the answer where the oracle finds none of an attribute's values
DESCRIBE = "describe the video."


def asked(prompt: str, free: bool = False) -> list[Question]:
    """Return the five questions of a caption: yes or no, or free answers."""
    caption = Attributes.parse(prompt)
    values = {name: getattr(caption, name) for name in ATTRIBUTES}
    if free:
        return [Question(name, FREE[name], values.get(name, STEADY[True])) for name in DIMENSIONS]
    return [Question(name, YES_OR_NO[name].format(values.get(name, "")), "yes") for name in DIMENSIONS]


def all_questions(free: bool = False) -> Questions:
    """Return the questions of all captions."""
    return Questions({prompt: asked(prompt, free) for part in split_prompts().values() for prompt in part})


def answers(measured: Mapping[str, Tensor], video: int) -> dict[str, str]:
    """Return the oracle's free answer of each dimension for one of the videos that it measured."""
    named = {}
    for name, values in ATTRIBUTES.items():
        index = int(measured[name][video])
        named[name] = values[index] if index >= 0 else UNCLEAR
    return named | {"steadiness": STEADY[bool(measured["steadiness"][video])]}


def described(named: Mapping[str, str]) -> str:
    """Join the answers of all dimensions into one sentence."""
    return f"a {named['colour']} {named['shape']} moves {named['direction']} {named['speed']} and {named['steadiness']}"
