"""Everything that wants a GPU, in pieces of a few minutes; a piece whose result is there is not run again.

    python bench/gpu.py [--budget 540] [--wheels FOLDER] [--only 'wan-1.3b*'] [--list]

First the kernels' tests, compiled, then the kernels' cases and the training steps of each world.  Each piece is a
process with a result file in bench/results/gpu/, which holds a hash of the sources that it was measured of: with other
sources it is run again.
A piece is started only if it should end within the budget (seconds), and is stopped then; what is left is listed.
Where a package is missing, the pieces that need it are left out, and the list says why.  --wheels first installs the
wheels of a folder, with no index and no dependencies; those of torch and triton in it are left alone.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]  # a machine where prfl is not installed will do

from prfl.benchmark.facts import facts, sources  # noqa: E402
from prfl_kernels.builds import RANKS, SHAPES  # noqa: E402

RESULTS = REPOSITORY / "bench/results/gpu"
LEFT_ALONE = ("torch", "triton", "nvidia", "cuda")
KERNELS = ("kernels", "tests/kernels")
CASES = (
    "kernels", "prfl/backbone/kernels.py", "prfl/benchmark/measure.py", "prfl/benchmark/kernel_problem.py",
    "prfl/benchmark/kernel_cases.py", "prfl/benchmark/block_case.py",
)  # fmt: skip
STEPS = (
    "kernels", "prfl/backbone", "prfl/build", "prfl/objective", "prfl/reward", "prfl/rollout",
    "prfl/benchmark/measure.py", "prfl/benchmark/worlds.py", "prfl/benchmark/step_problem.py",
    "prfl/benchmark/step_cases.py", "prfl/benchmark/rival_cases.py", "bench/rival.py",
)  # fmt: skip
STEP_SECONDS = {  # case and providers, the reference among them: about, with an H200; of wan-1.3b and wan-14b
    ("same_step", "latent", "pixel_1"): (240, 460),
    ("same_step", "latent", "pixel_4"): (260, 480),
    ("same_step", "latent", "pixel_all"): (330, 530),
    ("methods", "prfl", "dense"): (220, 390),
    ("methods", "prfl", "reuse"): (220, 390),
    ("methods", "prfl", "full_chain"): (390, 500),
    ("methods", "prfl", "vader_1"): (220, 290),
    ("methods", "prfl", "vader_5"): (290, 400),
    ("rival_prfl", "rival", "ours"): (220, 440),
    ("rival_vader", "rival", "ours"): (310, 530),
}
PIECES = (
    "score", "decode one forward", "decode one backward", "decode all forward", "decode all backward", "gradient_call",
)  # fmt: skip
COUNTS = ("value1", "value2", "value4")
SCALE = {
    "frames": ("value17", "value33", "value49", "value81"), "resolution": ("240x416", "480x832", "720x1280"),
    "steps": ("value2", "value4", "value8"), "gradients": COUNTS, "batch": COUNTS,
}  # fmt: skip
BARE = ("pytest",)
BENCHMARKS = (*BARE, "pytest_benchmark", "jaxtyping", "rich")
# Not pytest's options of pyproject.toml: they name plugins that may not be there.
PLAIN = ("-m", "pytest", "-q", "-x", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Piece:
    """command: of python.  of: folders and files that it measures.  needs: modules.  seconds: about, to plan with."""

    name: str
    command: tuple[str, ...]
    of: tuple[str, ...]
    needs: tuple[str, ...]
    seconds: float
    benchmark: bool = True

    @property
    def file(self) -> str:
        return f"{self.name}.json"


def pieces() -> Iterator[Piece]:
    for path in sorted((REPOSITORY / "tests/kernels/triton").glob("test_*.py")):
        here = str(path.relative_to(REPOSITORY))
        test = (*PLAIN, "--confcutdir", "tests/kernels", here)
        yield Piece(f"tests-{path.stem.removeprefix('test_')}", test, KERNELS, BARE, 120, benchmark=False)
    for world, shapes in (("wan-1.3b", SHAPES[:1]), ("wan-14b", SHAPES[1:])):
        for shape in shapes:
            for operation, ranks in {
                "qk_norm_rope": ("",), "gated_residual_norm": ("",), "attention": ("",),
                "lora_linear": RANKS, "wan_block": RANKS, "gradient_step": RANKS,
            }.items():  # fmt: skip
                for rank in ranks:
                    words = [operation, f"tokens{shape.tokens}", *([f"rank{rank}"] if rank else [])]
                    needs = (
                        BENCHMARKS
                        if operation not in ("wan_block", "gradient_step")
                        else (*BENCHMARKS, "prfl.backbone.kernels")
                    )
                    yield measuring(f"{world}-{'-'.join(words)}", world, " and ".join(words), needs)
    for (case, reference, provider), seconds in STEP_SECONDS.items():
        for world, each in zip(("wan-1.3b", "wan-14b"), seconds, strict=True):
            yield measuring(
                f"{world}-{case}-{provider}", world, f"{case} and ({reference} or {provider})",
                (*BENCHMARKS, "prfl.build"), "bench/bench_steps.py", STEPS, each, "--benchmark-min-rounds=2",
            )  # fmt: skip
    for world in ("wan-1.3b", "wan-14b"):
        yield from of_pieces(world)


def of_pieces(world: str) -> Iterator[Piece]:
    """The pieces of a step, and its cost against size: their modules cannot be asked where a package is missing."""
    scale = [f"scale {axis} {value}" for axis, values in SCALE.items() for value in values]
    for name, cases in {"piece": PIECES, "scale": scale}.items():
        file = {"piece": "bench/bench_pieces.py", "scale": "bench/bench_scale.py"}[name]
        of = (*STEPS, f"prfl/benchmark/{name}_cases.py")
        for words in cases:
            yield measuring(
                f"{world}-{words.replace(' ', '-')}", world, words.replace(" ", " and "),
                (*BENCHMARKS, "prfl.build"), file, of, 300, "--benchmark-min-rounds=3",
            )  # fmt: skip


def measuring(
    name: str, world: str, words: str, needs: tuple[str, ...], file: str = "bench/bench_kernels.py",
    of: tuple[str, ...] = CASES, seconds: float = 150, *more: str,
) -> Piece:  # fmt: skip
    plugin = ("-p", "prfl_bench", "--benchmark", "--benchmark-world", world, "--benchmark-max-time", "3", *more)
    options = tuple(option for option in PLAIN if option != "-x")
    return Piece(name, (*options, *plugin, file, "-k", words), of, needs, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds for all that is started now; default: 540")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install these first, without an index")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="pieces whose name matches, such as 'tests-*'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where new results go; default: bench/results/gpu")
    parser.add_argument("--list", action="store_true", help="say what is there and what is left, and run nothing")
    options = parser.parse_args()
    end = time.monotonic() + options.budget
    if options.wheels:
        install(options.wheels)
    chosen = [piece for piece in pieces() if fnmatch.fnmatch(piece.name, options.only)]
    states = {piece.name: state(piece, options.out) for piece in chosen}
    if not options.list:
        options.out.mkdir(parents=True, exist_ok=True)
        for piece in chosen:
            if states[piece.name] == "left" and piece.seconds <= end - time.monotonic():
                states[piece.name] = run(piece, options.out, end)
    for name, found in states.items():
        print(f"{name:50} {found}")
    print(f"{sum(each == 'left' for each in states.values())} of {len(states)} left")


def install(folder: Path) -> None:
    wheels = [str(path) for path in sorted(folder.glob("*.whl")) if not path.name.lower().startswith(LEFT_ALONE)]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheels], check=True)


def state(piece: Piece, out: Path) -> str:
    """ "there", "left", or why it cannot run here."""
    for folder in dict.fromkeys((out, RESULTS)):
        file = folder / piece.file
        if file.exists() and json.loads(file.read_text())["piece"]["sources"] == sources(piece.of):
            return "there"
    return next((f"left out: {reason}" for reason in map(obstacle, ("torch", *piece.needs)) if reason), "left")


@cache
def obstacle(module: str) -> str:
    """Why it does not import, in a process of its own; nothing where it does."""
    code = (
        "import torch; assert torch.cuda.is_available(), 'no GPU is here'" if module == "torch" else f"import {module}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def environment() -> dict[str, str]:
    folders = [str(REPOSITORY), str(REPOSITORY / "kernels"), str(REPOSITORY / "bench")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}


def run(piece: Piece, out: Path, end: float) -> str:
    """Runs it until ``end`` at most and stamps its result; what came of it."""
    target, partial = out / piece.file, out / f".partial-{piece.file}"
    command = [sys.executable, *piece.command, *([f"--benchmark-json={partial}"] if piece.benchmark else [])]
    print(f"[{time.strftime('%H:%M:%S')}] {piece.name}", flush=True)
    start = time.monotonic()
    log = out / f"{piece.name}.log"
    with open(log, "w") as console:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), stdout=console, stderr=console, start_new_session=True
        )
        try:
            process.wait(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the processes that it started, too
            process.wait()
            partial.unlink(missing_ok=True)
            return "left"
    last = log.read_text().strip().splitlines()[-1:]
    if not piece.benchmark and process.returncode:
        return f"FAILED, see {log}"
    if piece.benchmark and not (partial.exists() and partial.stat().st_size):
        return f"FAILED, see {log}"
    text = partial.read_text().replace(str(partial), target.name) if piece.benchmark else ""
    result = json.loads(text) if piece.benchmark else facts("random")
    for each in result.get("benchmarks", ()):
        each["stats"].pop("data", None)  # the rounds are in extra_info
    own = {"sources": sources(piece.of), "seconds": round(time.monotonic() - start), "last line": "".join(last)}
    partial.write_text(json.dumps({**result, "piece": {**own, "exit": process.returncode}}, indent=1) + "\n")
    partial.replace(target)
    if not process.returncode:
        log.unlink()
    return "there" if not process.returncode else f"there, but some providers FAILED: see {log}"


if __name__ == "__main__":
    main()
