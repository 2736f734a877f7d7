"""What a critic asks of a video: JSON lines of questions beside the prompts, each with the answer that is wanted.

    {"prompt": "a dog runs", "questions": [{"dimension": "subject", "ask": "Is a dog to be seen?", "answer": "yes"},
                                           {"dimension": "action", "ask": "What does it do?", "answer": "It runs."}]}
    {"prompt": "*", "questions": [{"dimension": "flicker", "ask": "Does the picture flicker?", "answer": "no"}]}

The row of the prompt "*" is asked of every prompt; ``{prompt}`` in a text stands for the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from prfl.data.manifest import Text, checked
from prfl.utils.errors import Faults, PrflError
from prfl.utils.files import atomic_write
from prfl.utils.reading import json_rows

EVERY = "*"
WHERE = "reward.critic.questions"


@dataclass(frozen=True)
class Question:
    """dimension: the name of its score.  answer: ``yes`` or ``no``, or a text, whose probability is scored."""

    dimension: str
    ask: str
    answer: str

    @property
    def yes_or_no(self) -> bool:
        return self.answer.casefold() in ("yes", "no")

    def about(self, prompt: str) -> Question:
        """Put the prompt into the texts."""
        return Question(self.dimension, self.ask.replace("{prompt}", prompt), self.answer.replace("{prompt}", prompt))


FITS = Question("alignment", 'Does the video show this: "{prompt}"? Answer with yes or no.', "yes")
"""What is asked where no questions are given: whether the video fits its prompt."""


class Questions:
    """by_prompt: the questions of each prompt; those of "*" are asked of every prompt, behind its own."""

    def __init__(self, by_prompt: Mapping[str, Sequence[Question]]) -> None:
        self.by_prompt = by_prompt
        names = (question.dimension for questions in by_prompt.values() for question in questions)
        self.dimensions = tuple(dict.fromkeys(names))

    def of(self, prompt: str) -> list[Question]:
        """Return what is asked of a prompt's videos, no two of one dimension.  Raises PrflError where it is nothing."""
        questions = list(self.by_prompt.get(prompt, ()))
        names = {question.dimension for question in questions}
        asked = questions + [question for question in self.by_prompt.get(EVERY, ()) if question.dimension not in names]
        if not asked:
            fix = f'write it a row (prfl questions CONFIG), or one of the prompt "{EVERY}", which is asked of all'
            raise PrflError(f"nothing is asked of the prompt {prompt[:80]!r}", where=WHERE, fix=fix)
        return [question.about(prompt) for question in asked]

    def check(self, prompts: Sequence[str]) -> None:
        """Raises PrflError, with all of them, for prompts of which nothing is asked."""
        faults = Faults()
        for prompt in prompts:
            with faults.collected():
                self.of(prompt)
        faults.raise_all(WHERE)


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True)
    dimension: Text
    ask: Text
    answer: Text


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True)
    prompt: Text
    questions: list[_Question] = Field(min_length=1)


def read_questions(path: str | Path) -> Questions:
    """Read a file of questions.

    Raises PrflError with file and line for every fault: a prompt twice, two questions of one dimension in a row.
    """
    path, faults = Path(path), Faults()
    by_prompt: dict[str, list[Question]] = {}
    for where, fields in json_rows(path):
        with faults.collected():
            prompt, asked = str(fields.get("prompt", "")).strip(), question_rows(fields, where)
            if prompt in by_prompt:
                what = f"the prompt {prompt[:80]!r} stands twice"
                raise PrflError(what, where=where, fix="put all its questions into one row")
            by_prompt[prompt] = asked
    faults.raise_all(path)
    if not by_prompt:
        raise PrflError("holds no questions", where=str(path), fix="write them: prfl questions CONFIG")
    return Questions(by_prompt)


def question_rows(fields: dict[str, Any], where: str) -> list[Question]:
    """Read the questions of one row.  Raises PrflError at ``where``."""
    row = checked(_Row, fields, where)
    names = [question.dimension for question in row.questions]
    if twice := {name for name in names if names.count(name) > 1}:
        fix = "give each question its own dimension: what it scores is weighed by that name"
        raise PrflError(f"two questions are of the dimension '{min(twice)}'", where=where, fix=fix)
    return [Question(**question.model_dump()) for question in row.questions]


def write_questions(path: Path, questions: Questions) -> None:
    """Write a file that ``read_questions`` reads."""
    rows = [
        json.dumps({"prompt": prompt, "questions": [asdict(question) for question in asked]}, ensure_ascii=False)
        for prompt, asked in questions.by_prompt.items()
    ]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
