"""``prfl questions``: from the template and by a chat model; what stands in the file stays; the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from prfl.config import load_config
from prfl.config.schema import Config
from prfl.labels.questions_page import write_page
from prfl.reward.questions import Question, Questions, read_questions, write_questions
from prfl.runs.questions import write_for
from prfl.utils.errors import PrflError

VADER = Path(__file__).parents[2] / "configs/tiny/vader.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "train.txt").write_text("a dog runs\na cat sleeps\n")
    (tmp_path / "questions.jsonl").write_text("")
    changes = [
        f"data.prompts={{train: {tmp_path / 'train.txt'}}}", "evaluation={every: 0}", "data.generator=null",
        "objective={name: vader}", f"data.cache={tmp_path / 'cache'}",
        f"reward={{space: pixel, shape: linear, critic: {{questions: {tmp_path / 'questions.jsonl'}}}}}",
    ]  # fmt: skip
    (tmp_path / "questions.jsonl").unlink()
    return load_config(VADER, changes)


def test_the_template_asks_of_every_prompt_and_keeps_what_was_mended(config: Config, tmp_path: Path) -> None:
    mended = Question("subject", "Is it a dog?", "yes")
    write_questions(tmp_path / "questions.jsonl", Questions({"a dog runs": [mended]}))
    path = write_for(config)
    written = read_questions(path)
    assert path == tmp_path / "questions.jsonl" and written.of("a dog runs") == [mended]
    alignment, *_ = written.of("a cat sleeps")
    assert alignment.ask == 'Does the video show this: "a cat sleeps"? Answer with yes or no.'

    free = read_questions(write_for(config, tmp_path / "free.jsonl", free=True))
    assert free.of("a dog runs")[0].answer == "a dog runs" and not any(q.yes_or_no for q in free.of("a dog runs"))


def test_a_chat_model_has_several_tries_and_a_prompt_without_questions_is_named(config: Config, tmp_path: Path) -> None:
    rows = [{"dimension": "action", "ask": "Does it run?", "answer": "yes"}]
    asked = []

    def chat(text: str, number: int) -> str:
        asked.append((text, number))
        if "cat" in text:
            return "I would rather not."
        return "Of course: [1]" if number == 0 else f"Here they are:\n{json.dumps(rows)}\nGood luck!"

    with pytest.raises(PrflError, match="(?s)a cat sleeps.*I would rather not.*by hand"):
        write_for(config, chat=chat)
    assert [number for text, number in asked if "dog" in text] == [0, 1]
    assert read_questions(tmp_path / "questions.jsonl").of("a dog runs") == [Question("action", "Does it run?", "yes")]


def test_the_page_holds_every_question_and_no_prompt_ends_its_script(tmp_path: Path) -> None:
    questions = Questions({"</script><b>": [Question("x", "Is it <i>?", "yes")]})
    text = write_page(tmp_path / "page.html", questions, "questions.jsonl").read_text()
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, flags=re.S)
    assert json.loads(data)["rows"] == [
        {"prompt": "</script><b>", "questions": [{"dimension": "x", "ask": "Is it <i>?", "answer": "yes"}]}
    ]
