"""Text files are UTF-8 whatever the locale: every place that reads or writes text says so."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def unsaid(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that leave the encoding of text to the locale.  (ruff's PLW1514 sees only what is known to be a Path.)"""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or any(word.arg == "encoding" for word in call.keywords):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = getattr(getattr(call.func, "value", None), "id", "")
        texts = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        mode = next((text for text in texts if re.fullmatch(r"[rwax+bt]{1,3}", str(text))), "r")
        if (name == "read_text" and not call.args) or (name == "write_text" and len(call.args) == 1):
            yield call
        elif name == "open" and owner not in ("av", "os", "Image") and "b" not in mode:
            yield call
        elif any(word.arg == "text" for word in call.keywords) and name in ("run", "Popen", "check_output"):
            yield call


def test_no_file_is_left_to_the_locale() -> None:
    sources = [path for folder in ("prfl", "bench", "kernels") for path in (REPOSITORY / folder).rglob("*.py")]
    assert len(sources) > 100
    found = [
        f"{path.relative_to(REPOSITORY)}:{call.lineno}"
        for path in sources
        for call in unsaid(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, f"say encoding='utf-8': {', '.join(found)}"


def test_what_is_left_to_the_locale_is_found() -> None:
    wrong = ["p.read_text()", "p.write_text(t)", "open(p)", "open(p, 'a')", "p.open()", "subprocess.run(c, text=True)"]
    right = ["p.read_text(encoding='utf-8')", "p.write_text(t, encoding='utf-8')", "open(p, 'rb')", "p.open('rb')",
             "av.open(b, 'w')", "os.open(p, f)", "subprocess.run(c, encoding='utf-8')"]  # fmt: skip
    assert [list(unsaid(ast.parse(text))) != [] for text in (*wrong, *right)] == [True] * 6 + [False] * 7
