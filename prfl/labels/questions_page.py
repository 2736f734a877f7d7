"""One HTML file on which a person reads and mends the questions of a critic; it saves them as JSON lines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from prfl.evaluation.style import STYLE
from prfl.reward.questions import Questions
from prfl.utils.files import atomic_write
from prfl.utils.text import html_text

TEMPLATE = Path(__file__).parent / "questions.html"


def write_page(path: Path, questions: Questions, name: str) -> Path:
    """Write the page (atomically).  name: of the file that it saves."""
    rows = [
        {"prompt": prompt, "questions": [asdict(question) for question in asked]}
        for prompt, asked in questions.by_prompt.items()
    ]
    data = json.dumps({"name": name, "rows": rows}, ensure_ascii=False).replace("<", "\\u003c")
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("{{style}}", STYLE).replace("{{name}}", html_text(name)).replace("{{data}}", data)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
