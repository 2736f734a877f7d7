"""Names say what they hold, and files stay short.  What is left from before is listed here, and only gets less."""

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

LEFT: dict[str, int] = {  # by file: its functions with a vague local
    "prfl/backbone/adapters.py": 4,
    "prfl/backbone/attention.py": 1,
    "prfl/backbone/checkpointing.py": 1,
    "prfl/backbone/dropout.py": 3,
    "prfl/backbone/fingerprint.py": 2,
    "prfl/backbone/wan/architecture.py": 1,
    "prfl/backbone/wan/kernels.py": 3,
    "prfl/backbone/wan/loading.py": 2,
    "prfl/backbone/weights.py": 1,
    "prfl/cli.py": 1,
    "prfl/data/cache.py": 2,
    "prfl/data/clips.py": 3,
    "prfl/data/dataset.py": 1,
    "prfl/data/entries.py": 1,
    "prfl/data/leaks.py": 5,
    "prfl/data/manifest.py": 3,
    "prfl/data/prompts.py": 3,
    "prfl/data/sources.py": 2,
    "prfl/data/video.py": 1,
    "prfl/estimate/live_tensors.py": 1,
    "prfl/estimate/memory.py": 1,
    "prfl/estimate/missing_inputs.py": 6,
    "prfl/estimate/nfe.py": 2,
    "prfl/estimate/parts.py": 1,
    "prfl/estimate/phases.py": 1,
    "prfl/estimate/rewards.py": 1,
    "prfl/estimate/stored_latents.py": 1,
    "prfl/estimate/suggestions.py": 6,
    "prfl/evaluation/hacking.py": 3,
    "prfl/evaluation/media.py": 1,
    "prfl/evaluation/metrics.py": 4,
    "prfl/evaluation/plots.py": 3,
    "prfl/evaluation/policy_eval.py": 4,
    "prfl/evaluation/report.py": 1,
    "prfl/evaluation/reward_eval.py": 2,
    "prfl/evaluation/run_files.py": 5,
    "prfl/evaluation/tables.py": 1,
    "prfl/export/card.py": 3,
    "prfl/export/run.py": 1,
    "prfl/labels/draw.py": 2,
    "prfl/labels/page.py": 2,
    "prfl/labels/table.py": 4,
    "prfl/objective/base.py": 1,
    "prfl/objective/preference.py": 4,
    "prfl/objective/reused_rollout.py": 1,
    "prfl/objective/reward_gradient.py": 3,
    "prfl/objective/scorer.py": 3,
    "prfl/rollout/sampling.py": 1,
    "prfl/runs/doctor.py": 1,
    "prfl/runs/machine.py": 4,
    "prfl/runs/outcomes.py": 2,
    "prfl/runs/sample.py": 1,
    "prfl/runs/score.py": 5,
    "prfl/runs/train_reward.py": 1,
    "prfl/toy/clips.py": 1,
    "prfl/toy/oracle.py": 1,
    "prfl/toy/renderer.py": 3,
    "prfl/utils/files.py": 6,
    "prfl/utils/interrupts.py": 1,
    "prfl/utils/lock.py": 1,
    "prfl/utils/processes.py": 1,
    "prfl/utils/text.py": 1,
}
LONGER = {"prfl/backbone/wan/model.py"}

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
    wrong = {name: left for name, left in functions.items() if len(left) != LEFT.get(name, 0)}
    assert not wrong, f"more, or fewer, than LEFT says: {wrong}"
    assert set(LEFT) <= set(FILES)


def test_files_stay_short() -> None:
    assert {name for name, text in FILES.items() if text.count("\n") > LONGEST} == LONGER


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
