"""Names say what they hold, and files stay short."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FILES = {
    str(path.relative_to(REPOSITORY)): path.read_text()
    for folder in ("prfl", "kernels", "bench")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
}
VAGUE = set("own some found known made given place said seen one".split())
LONGEST = 400  # lines of a file
NAMED = ast.ExceptHandler | ast.MatchAs | ast.MatchStar | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def locals_of(function: ast.AST) -> set[str]:
    """Arguments and whatever is bound inside, comprehensions and nested functions included."""
    nodes = list(ast.walk(function))[1:]
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    named = {node.name or "" for node in nodes if isinstance(node, NAMED)}
    return bound | arguments | named


def vague(text: str) -> list[str]:
    """``function (line): names`` of each function with a vague local."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    names = [VAGUE & locals_of(function) for function in functions]
    return [f"{f.name} ({f.lineno}): {', '.join(sorted(n))}" for f, n in zip(functions, names, strict=True) if n]


def test_no_function_has_a_vague_local() -> None:
    functions = {name: vague(text) for name, text in FILES.items()}
    assert not {name: wrong for name, wrong in functions.items() if wrong}


def test_files_stay_short() -> None:
    assert {name for name, text in FILES.items() if text.count("\n") > LONGEST} == set()


HIDDEN = """own = 1
for _, some in x: pass
[0 for one in x]
with x as (known, _): pass
made: int = 1
lambda given: 0
(seen := 1)
def one(): pass"""


def test_where_a_vague_local_may_hide() -> None:
    for body in HIDDEN.split("\n"):
        assert len(vague(f"def f(x):\n {body}")) == 1, body
    assert len(vague("def f(x):\n try: pass\n except E as found: pass")) == 1
    assert vague("def f(x, *, said=1): pass") == ["f (1): said"]
    assert not vague("def f(x): return x.own, x(place=1), found")
