"""Writes the questions of a critic for a config's prompts: from a template, or by a chat model on this machine.

It is done once, before the training, so that a person can read and mend them.  What stands in the file stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from prfl.backbone.condition import texts
from prfl.config.schema import Config
from prfl.factory.critic import INSIDE, find_questions
from prfl.factory.prompts import load_prompts
from prfl.reward.public import load_error
from prfl.reward.questions import FITS, WHERE, Question, Questions, question_rows, read_questions, write_questions
from prfl.reward.tokens import load_tokenizer
from prfl.utils.errors import Faults, PrflError

Chat = Callable[[str, int], str]
"""(text, number of the try) -> answer: the first try is the likeliest answer, the others are drawn."""
EXAMPLE = "Qwen/Qwen3-4B-Instruct-2507"
TRIES = 3
NEW_TOKENS = 600

# The three aspects that Diffusion-DRF asks for: alignment with the text, physical fidelity, quality.
TEMPLATE = (
    FITS,
    Question("physics", "Do all things move and touch as they would in the real world? Answer with yes or no.", "yes"),
    Question("quality", "Is the picture sharp and steady, without flicker? Answer with yes or no.", "yes"),
)
FREE_TEMPLATE = (
    Question("alignment", "What does the video show? Answer in one sentence.", "{prompt}"),
    Question("physics", "How do the things in the video move?", "They move and touch as they would in the real world."),
    Question("quality", "How good is the picture?", "It is sharp and steady, without flicker."),
)
INSTRUCTION = """\
A video generator was given this prompt:

{prompt}

Write three to six questions that tell whether a video shows what the prompt asks for: its things, their looks, what
they do, how they move. One question for one thing. {form}
Answer with nothing but a JSON list, as
[{{"dimension": "subject", "ask": "...", "answer": "..."}}]
The dimension is one or two words, and no two questions have the same."""
YES_OR_NO = 'Each can be answered by yes or no alone, and the answer for a right video is "yes" or "no".'
FREE = "Each is answered in a few words, and the answer is that of a right video."


def write_for(
    config: Config, out: Path | None = None, *, free: bool = False, chat: Chat | None = None,
    progress: Callable = iter,
) -> Path:  # fmt: skip
    """Write the questions of all prompts of a config; returns the file.

    out: None is ``reward.critic.questions``.  free: answers in words in place of yes or no.  chat: None is a template.
    Raises PrflError, with what could be written in the file, for prompts of which the model's answer is no list.
    """
    prompts = [prompt for part in load_prompts(config.data).values() for prompt in texts(part)]
    path = out or file_of(config)
    written = dict(read_questions(path).by_prompt) if path.exists() else {}
    shipped = find_questions("shapes-answers" if free else "shapes")
    assert isinstance(shipped, Questions)

    faults = Faults()
    for prompt in progress([prompt for prompt in prompts if prompt not in written]):
        if chat is not None:
            with faults.collected():
                written[prompt] = asked_by(chat, prompt, free)
                write_questions(path, Questions(written))
        elif prompt in shipped.by_prompt:
            written[prompt] = shipped.by_prompt[prompt]
        else:
            written[prompt] = [question.about(prompt) for question in (FREE_TEMPLATE if free else TEMPLATE)]
    if written:
        write_questions(path, Questions(written))
    faults.raise_all(path, "prompts")
    return path


def file_of(config: Config) -> Path:
    """Return the file that the config names for its questions.  Raises PrflError where it names none."""
    section = getattr(config.reward, "critic", None)
    if section is None or section.questions is None or section.questions in INSIDE:
        raise PrflError("the config names no file of questions", where=WHERE, fix="name one, or give --out FILE")
    return Path(section.questions)


def asked_by(chat: Chat, prompt: str, free: bool) -> list[Question]:
    """Let a model write the questions of one prompt.  Raises PrflError where none of its tries can be read."""
    text = INSTRUCTION.format(prompt=prompt, form=FREE if free else YES_OR_NO)
    answer = ""
    for number in range(TRIES):
        answer = chat(text, number)
        try:
            rows = json.loads(answer[answer.index("[") : answer.rindex("]") + 1])
            return question_rows({"prompt": prompt, "questions": rows}, prompt)
        except (ValueError, PrflError):
            continue
    what = f"the model's answer is no list of questions: {answer.strip()[:120]!r}"
    raise PrflError(what, where=repr(prompt[:80]), fix="write them by hand, or take another model")


def load_chat(model: str, device: torch.device | str = "cpu") -> Chat:
    """Load a chat model of transformers from a folder or hub id.  Raises PrflError."""
    tokenizer = load_tokenizer(model, None, EXAMPLE)
    try:
        network = AutoModelForCausalLM.from_pretrained(
            model, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
        network = network.to(device).eval()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        kind = f"chat model, as {EXAMPLE}"
        raise load_error(model, error, "chat model", kind, f"give the folder or hub id of a {kind}") from error

    @torch.no_grad()
    def chat(text: str, number: int) -> str:
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(device)  # fmt: skip
        torch.manual_seed(number)
        drawn = network.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=number > 0)
        return tokenizer.decode(drawn[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return chat
