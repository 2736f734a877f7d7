"""What bench/gpu.py runs: each piece a process of a few minutes, with a result file of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from bench.harness.facts import REPOSITORY
from prfl_kernels.builds import RANKS, SHAPES, Shape

KERNELS = ("kernels", "tests/kernels")
CASES = (
    "kernels", "prfl/backbone/wan/kernels.py", "bench/harness/measure.py", "bench/cases/kernel_problem.py",
    "bench/cases/kernel_cases.py", "bench/cases/block_case.py",
)  # fmt: skip
STEPS = (
    "kernels", "prfl/backbone", "prfl/factory", "prfl/objective", "prfl/reward", "prfl/rollout",
    "bench/harness/measure.py", "bench/harness/worlds.py", "bench/cases/step_problem.py",
    "bench/cases/step_cases.py", "bench/cases/rival_cases.py", "bench/rival.py",
)  # fmt: skip
WORLDS = ("wan-1.3b", "wan-14b")
# Seconds of one run, of wan-1.3b and wan-14b: operations at 600 TFLOPS, 0.3 s to decode a latent frame of 480p and four
# times that with its gradient.  No GPU has run them yet.
RUN: dict[str, dict[str, tuple[float, float]]] = {
    "same_step": {"latent": (3.5, 10.5), "pixel_1": (7, 11.5), "pixel_4": (21, 20), "pixel_all": (27, 24)},
    "methods": {
        "prfl": (5.5, 8), "dense": (36, 41), "reuse": (18, 29), "full_chain": (30, 35), "vader_1": (12, 15),
        "vader_5": (20, 28),
    },
    "rival_prfl": {"rival": (3.5, 20), "ours": (3.5, 20), "ours_kernels": (3.5, 20)},
    "rival_vader": {"rival": (5, 22), "ours": (5, 22), "ours_kernels": (5, 22)},
}  # fmt: skip
# GiB of the largest provider, as `prfl train --dry-run` counts them; what is left out here needs less than 75.
STEP_GIB = {
    ("same_step", "pixel_4"): (112, 114), ("same_step", "pixel_all"): (112, 114),
}  # fmt: skip
START, CHILD = 40.0, (25.0, 45.0)  # a process's imports and its model; the process that measures a provider's memory
# Runs of a provider: first, warm-up, two rounds, saved bytes, two for memory; and of those that are not long.
LONG, RUNS, MORE = 3.0, 7, 3
COUNTS = ("value1", "value2", "value4")
# Solver steps, gradient steps and batch: seconds of the largest, of both worlds.
SCALE: dict[str, tuple[tuple[str, ...], tuple[float, float]]] = {
    "steps": (("value2", "value4", "value8"), (110, 180)), "batch": (COUNTS, (120, 290)),
    "gradients": (("value1", "value2", "value3", "value4"), (110, 250)),
}  # fmt: skip
# axis, value: seconds of a run of PRFL's and of VADER's step, and GiB of VADER's; a triple of each world
SIZES: dict[tuple[str, str], tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    ("frames", "value17"): ((0.6, 6.5, 55), (3, 9, 82)), ("frames", "value33"): ((1, 11.5, 70), (6, 17, 99)),
    ("frames", "value49"): ((1.6, 16, 84), (10.5, 25, 116)), ("frames", "value81"): ((3.5, 28, 114), (20, 44, 150)),
    ("resolution", "240x416"): ((0.4, 3.5, 22), (2, 5, 48)), ("resolution", "480x832"): ((1, 11.5, 70), (6, 17, 99)),
    ("resolution", "720x1280"): ((3.5, 28, 153), (20, 44, 188)),
}  # fmt: skip
LARGEST = 139.0  # GiB of the largest card that is lent
PIECES = {  # seconds and GiB, of both worlds
    "score": ((320, 400), (70, 99)),
    "decode one forward": ((120, 140), (40, 68)), "decode one backward": ((150, 190), (40, 68)),
    "decode all forward": ((140, 160), (40, 68)), "decode all backward": ((200, 240), (70, 99)),
}  # fmt: skip
MODES = {  # gradient_call: words that choose one of its providers
    "full": "full and not offload and not kernels", "none": "none and not kernels",
    "attention": "attention and not offload", "full-offload": "full and offload and not kernels",
    "attention-offload": "attention and offload", "none-kernels": "none and kernels",
    "full-kernels": "full and kernels and not offload", "full-offload-kernels": "full and offload and kernels",
}  # fmt: skip
# The cases of bench/predicted_memory.py, but 14B's full chains: two steps of forty gradients take a quarter of an hour;
# and but image-to-video: the benchmarks' worlds have no first frames.
PREDICTED = (
    "1.3B 480p", "14B 480p", "14B 480p, offload", "14B 720p", "14B 720p, offload", "14B 480p, attention kept",
    "14B 480p, kernels", "14B 720p, kernels", "14B 720p, offload, kernels", "1.3B 480p, full chain",
)  # fmt: skip
# A score with its gradient by rewards that others trained: seconds of a run on 33 frames, as counted, at 40 TFLOPS in
# float32.  No GPU has run them yet.
REWARDS = {
    "aesthetic": 0.5, "clip": 0.5, "pickscore": 0.9, "hps": 0.9, "imagereward": 0.4, "mps": 1.1, "hpsv3": 3.0,
    "videoalign": 0.3, "object": 4.5, "action": 0.1, "coherence": 0.3,
}  # fmt: skip
LEFT_OUT = {  # what is in no piece, and why
    "wan-14b bench_rewards": "the rewards are those of wan-1.3b",
    "step_modes": "bench/ten_minutes.py runs it",
    "same_step pixel_plain": "the decoder keeps everything of all frames",
    "wan-14b gradient_step tokens75600 backward": "a run takes 45 s, and a piece has nine of them or more",
    "wan-14b gradient_step tokens75600 both": "likewise",
    "wan-14b steer": "its chains take longer than a piece may",
    "wan-1.3b scale resolution 720x1280 vader": "needs 150 GiB", "wan-14b scale resolution 720x1280 vader": "184 GiB",
    "wan-14b scale frames value81 vader": "146 GiB",
}  # fmt: skip
FIRST = (
    "tests-*", "ten-minutes", "wan-1.3b-same_step-pixel_all", "wan-1.3b-same_step-pixel_1", "memory-1.3B-480p",
    "memory-14B-480p",
    "wan-1.3b-gradient_step-*-rank64", "wan-1.3b-rival_prfl-*", "memory-14B-480p-kernels", "wan-1.3b-attention*",
    "wan-1.3b-lora_linear-*-rank64", "wan-1.3b-qk_norm_rope*", "wan-1.3b-gated_residual_norm*",
    "wan-1.3b-methods-full_chain", "memory-*", "wan-1.3b-*",
)  # fmt: skip
BARE = ("pytest",)
BENCHMARKS = (*BARE, "pytest_benchmark", "jaxtyping", "rich")
TRANSFORMER = (*BENCHMARKS, "prfl.backbone.wan.kernels")
STEP_NEEDS = (*BENCHMARKS, "prfl.factory")
# Not pytest's options of pyproject.toml: they name plugins that may not be there.
PLAIN = ("-m", "pytest", "-q", "-x", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Piece:
    """command: of python.  of: folders and files that it measures.  needs: modules.  seconds: about, to plan with.
    result: the option that names its result file; a test has none.  gib: of the GPU's memory."""

    name: str
    command: tuple[str, ...]
    of: tuple[str, ...]
    needs: tuple[str, ...]
    seconds: float
    result: str = "--benchmark-json"
    gib: float = 0.0

    @property
    def file(self) -> str:
        return f"{self.name}.json"

    @property
    def failure(self) -> str:
        """Return the name of the file that says why there is no result."""
        return f"{self.name}.failed"


def pieces() -> list[Piece]:
    """Sort all pieces, the tests first and then what one wants to know most: the lease may end before the list."""

    def rank(piece: Piece) -> int:
        return next((i for i, pattern in enumerate(FIRST) if fnmatch(piece.name, pattern)), len(FIRST))

    return sorted(all_pieces(), key=rank)


def all_pieces() -> Iterator[Piece]:
    for path in sorted((REPOSITORY / "tests/kernels/triton").glob("test_*.py")):
        here = str(path.relative_to(REPOSITORY))
        test = (*PLAIN, "--confcutdir", "tests/kernels", here)
        yield Piece(f"tests-{path.stem.removeprefix('test_')}", test, KERNELS, BARE, 120, result="")

    parts = "bench/ten_minutes.py", "bench/ten_minutes_parts.py", "bench/ten_minutes_tiles.py"
    yield Piece(
        "ten-minutes",
        (parts[0], "--budget", "520"),
        (*STEPS, *CASES, *parts),
        (*BENCHMARKS, "prfl.factory"),
        530,
        result="",
        gib=70,
    )

    for world, shapes in zip(WORLDS, (SHAPES[:1], SHAPES[1:]), strict=True):
        for shape in shapes:
            yield from of_kernels(world, shape)
    for number, world in enumerate(WORLDS):
        yield from of_steps(number, world)
        yield from of_pieces(number, world)
        yield from of_scale(number, world)

    peaks = json.loads((REPOSITORY / "bench/results/memory.json").read_text(encoding="utf-8"))["cases"]
    for name in PREDICTED:
        script = "bench/measured_memory.py"
        of = (*STEPS, "prfl/estimate", script)
        slug = name.replace(",", "").replace(" ", "-")
        seconds = 280 if "720p" in name else 240 if "full chain" in name else 150
        command = script, "--case", name
        gib = 1.05 * peaks[name]["peak GB"] * 1e9 / 2**30
        yield Piece(f"memory-{slug}", command, of, (*BENCHMARKS, "prfl.factory"), seconds, "--out", gib)


def of_kernels(world: str, shape: Shape) -> Iterator[Piece]:
    """Yield the operations, a block, and a gradient step of all blocks, its modes apart where a run takes seconds."""
    long = shape.tokens > 40000
    for operation in ("qk_norm_rope", "gated_residual_norm", "attention"):
        yield measuring(world, [operation, f"tokens{shape.tokens}"], 150)
    for rank in RANKS:
        size = f"tokens{shape.tokens}", f"rank{rank}"
        yield measuring(world, ["lora_linear", *size], 150)
        yield measuring(world, ["wan_block", *size], 300 if long else 200, needs=TRANSFORMER)
        modes = {"": 190.0} if world == "wan-1.3b" else {"forward": 100, "backward": 205, "both": 320}
        for mode, seconds in ({"forward": 205.0} if long else modes).items():
            words = ["gradient_step", *size, *([mode] if mode else [])]
            yield measuring(world, words, seconds, needs=TRANSFORMER)


def of_steps(number: int, world: str) -> Iterator[Piece]:
    """Yield each provider beside its case's reference."""
    for case, runs in RUN.items():
        reference, *others = runs
        for provider in others:
            both = lasting(number, [runs[reference][number], runs[provider][number]])
            gib = STEP_GIB.get((case, provider), (0, 0))[number]
            words = [case, f"(-{reference}] or -{provider}])"]
            yield measuring(world, words, both, f"{case}-{provider}", "bench/bench_steps.py", STEPS, STEP_NEEDS, gib)


def of_pieces(number: int, world: str) -> Iterator[Piece]:
    """Yield the pieces of a step by themselves."""
    file, of = "bench/bench_pieces.py", (*STEPS, "bench/cases/piece_cases.py")
    for words, (seconds, gib) in PIECES.items():
        yield measuring(world, words.split(), seconds[number], "", file, of, STEP_NEEDS, gib[number])
    if world == "wan-1.3b":
        yield measuring(world, ["gradient_call"], 320, "", file, of, STEP_NEEDS)
        yield measuring(world, ["steer"], 480, "", file, of, STEP_NEEDS, gib[number])  # never timed: at most
        yield from of_rewards(number, world)
        return
    for mode, chosen in MODES.items():  # the reference is measured beside each
        largest = 138.0 if mode == "none" else 0.0
        yield measuring(world, ["gradient_call", chosen], 200, f"gradient_call-{mode}", file, of, STEP_NEEDS, largest)


def of_rewards(number: int, world: str) -> Iterator[Piece]:
    """Yield each reward that others trained, beside the latent head, which has a piece of its own, too."""
    file, of = "bench/bench_rewards.py", (*STEPS, "bench/cases/reward_cases.py")
    for name, seconds in {"latent reward": 0.1, **REWARDS}.items():
        word = f"-{name}]" if name in REWARDS else "-latent"
        both = lasting(number, [0.1, seconds])
        yield measuring(world, ["reward", word], both, f"reward-{name.split()[0]}", file, of, STEP_NEEDS)


def of_scale(number: int, world: str) -> Iterator[Piece]:
    """Cost against size; where the decoder grows, PRFL's step and VADER's apart: a card may have room for one alone."""
    file, of = "bench/bench_scale.py", (*STEPS, "bench/cases/scale_cases.py")
    for axis, (values, seconds) in SCALE.items():
        for value in values:
            yield measuring(world, ["scale", axis, value], seconds[number], "", file, of, STEP_NEEDS)
    for (axis, value), costs in SIZES.items():
        prfl, vader, gib = costs[number]
        name = f"scale-{axis}-{value}"
        words = ["scale", axis, value, "-prfl]"]
        yield measuring(world, words, lasting(number, [prfl]), f"{name}-prfl", file, of, STEP_NEEDS)
        if gib <= LARGEST:
            both = lasting(number, [prfl, vader])
            words = ["scale", axis, value, "-vader]"]
            yield measuring(world, words, both, f"{name}-vader", file, of, STEP_NEEDS, gib)


def lasting(number: int, runs: Sequence[float]) -> float:
    """Return the seconds of a piece with providers whose runs take so long."""
    return round(START + sum(CHILD[number] + (RUNS + MORE * (run < LONG)) * run for run in runs))


def measuring(
    world: str, words: Sequence[str], seconds: float, name: str = "", file: str = "bench/bench_kernels.py",
    of: tuple[str, ...] = CASES, needs: tuple[str, ...] = BENCHMARKS, gib: float = 0.0,
) -> Piece:  # fmt: skip
    """Make a piece of a benchmark.  words: pytest's -k, all of which must be there."""
    plugin = ("-p", "prfl_bench", "--benchmark", "--benchmark-world", world)
    limits = ("--benchmark-max-time", "3", "--benchmark-min-rounds=2", "-rs")
    options = tuple(option for option in PLAIN if option != "-x")
    command = (*options, *plugin, *limits, file, "-k", " and ".join(words))
    return Piece(f"{world}-{name or '-'.join(words)}", command, of, needs, seconds, gib=gib)
