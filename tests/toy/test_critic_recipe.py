"""The critic inside the package: its grammar, its lessons, and what it answers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from prfl.reward.critic import load_critic
from prfl.toy import critic_recipe, questions, renderer
from prfl.toy.clips import CLIP, critic_folder
from prfl.toy.oracle import DIMENSIONS


def test_every_word_that_is_asked_or_answered_is_known() -> None:
    tokenizer = critic_recipe.new_tokenizer()
    unknown = tokenizer.unk_token_id
    captions = [attributes.caption for attributes in renderer.all_attributes()]
    asked = [question for caption in captions for free in (False, True) for question in questions.asked(caption, free)]
    texts = {text for question in asked for text in (question.ask, question.answer)} | {questions.DESCRIBE, "no"}
    texts |= {questions.described(dict.fromkeys(DIMENSIONS, questions.UNCLEAR)), questions.STEADY[False]}
    for text in sorted(texts):
        assert unknown not in tokenizer(text, add_special_tokens=False).input_ids, text
    assert len(tokenizer("<1.9 seconds>", add_special_tokens=False).input_ids) == 1


def test_lessons_have_the_oracles_answers() -> None:
    scenes = renderer.sample_scenes(3, 0, 12, [attributes.caption for attributes in renderer.all_attributes()])
    answers = critic_recipe.measured(renderer.render(scenes))
    for scene, named in zip(scenes, answers, strict=True):
        assert questions.described(named) == f"{scene.drawn.caption} and steadily"

    drawn = critic_recipe.lessons(answers, 40, random.Random(0), closed=20)
    for lesson in drawn:
        (name,) = {name for name, ask in questions.FREE.items() if ask == lesson.ask} or {None}
        if name:
            assert lesson.answer == answers[lesson.video][name]
    yes = [lesson for lesson in drawn if lesson.answer in ("yes", "no") and "steadily" not in lesson.ask]
    for lesson in yes:
        right = any(value in lesson.ask.rstrip("?").split() for value in answers[lesson.video].values())
        assert lesson.answer == ("yes" if right else "no"), lesson
    assert 0.35 < sum(lesson.answer == "yes" for lesson in yes) / len(yes) < 0.65


@pytest.fixture(scope="module")
def shipped() -> Path:
    return critic_folder()


def test_the_critic_inside_sees_what_the_oracle_sees(shipped: Path) -> None:
    """Its accuracy is in bench/results/critic.json; here it is enough that it is far from guessing."""
    assert sum(file.stat().st_size for file in shipped.iterdir()) < 10 * 2**20
    critic = load_critic(str(shipped), questions.all_questions(), critic_recipe.FRAMES, clip=CLIP)
    right = critic_recipe.examined(critic, critic_recipe.rendered(9001, 0, 16))
    chance = {"shape": 1 / 3, "colour": 1 / 6, "direction": 1 / 4, "speed": 1 / 2}
    for name, share in chance.items():
        assert right[f"free/{name}"] > share + 0.25, right
    assert torch.tensor([right[f"yes or no/{name}"] for name in chance]).mean() > 0.65
