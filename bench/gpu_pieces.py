"""What bench/gpu.py runs: each piece a process of a few minutes, with a result file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

from prfl.benchmark.facts import REPOSITORY
from prfl_kernels.builds import RANKS, SHAPES

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
PREDICTED = (  # the cases of bench/predicted_memory.py
    "1.3B 480p", "14B 480p", "14B 480p, offload", "14B 720p", "14B 720p, offload", "14B 480p, attention kept",
    "14B 480p, kernels", "14B 720p, kernels", "14B 720p, offload, kernels", "1.3B 480p, full chain",
)  # fmt: skip
FIRST = (
    "tests-*", "wan-1.3b-same_step-pixel_all", "wan-1.3b-same_step-pixel_1", "memory-1.3B-480p", "memory-14B-480p",
    "wan-1.3b-gradient_step-*-rank64", "wan-1.3b-rival_prfl-ours", "memory-14B-480p-kernels", "wan-1.3b-attention*",
    "wan-1.3b-lora_linear-*-rank64", "wan-1.3b-qk_norm_rope*", "wan-1.3b-gated_residual_norm*",
    "wan-1.3b-methods-full_chain", "memory-*", "wan-1.3b-*",
)  # fmt: skip
BARE = ("pytest",)
BENCHMARKS = (*BARE, "pytest_benchmark", "jaxtyping", "rich")
# Not pytest's options of pyproject.toml: they name plugins that may not be there.
PLAIN = ("-m", "pytest", "-q", "-x", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Piece:
    """command: of python.  of: folders and files that it measures.  needs: modules.  seconds: about, to plan with.
    result: the option that names its result file; a test has none."""

    name: str
    command: tuple[str, ...]
    of: tuple[str, ...]
    needs: tuple[str, ...]
    seconds: float
    result: str = "--benchmark-json"

    @property
    def file(self) -> str:
        return f"{self.name}.json"


def pieces() -> list[Piece]:
    """All of them, the tests first and then what one wants to know most: the lease may end before the list."""

    def rank(piece: Piece) -> int:
        return next((i for i, pattern in enumerate(FIRST) if fnmatch(piece.name, pattern)), len(FIRST))

    return sorted(all_pieces(), key=rank)


def all_pieces() -> Iterator[Piece]:
    for path in sorted((REPOSITORY / "tests/kernels/triton").glob("test_*.py")):
        here = str(path.relative_to(REPOSITORY))
        test = (*PLAIN, "--confcutdir", "tests/kernels", here)
        yield Piece(f"tests-{path.stem.removeprefix('test_')}", test, KERNELS, BARE, 120, result="")
    for world, shapes in (("wan-1.3b", SHAPES[:1]), ("wan-14b", SHAPES[1:])):
        for shape in shapes:
            for operation, ranks in {
                "qk_norm_rope": ("",), "gated_residual_norm": ("",), "attention": ("",),
                "lora_linear": RANKS, "wan_block": RANKS, "gradient_step": RANKS,
            }.items():  # fmt: skip
                for rank in ranks:
                    words = [operation, f"tokens{shape.tokens}", *([f"rank{rank}"] if rank else [])]
                    swaps = ("prfl.backbone.kernels",) if operation in ("wan_block", "gradient_step") else ()
                    needs = (*BENCHMARKS, *swaps)
                    yield measuring(f"{world}-{'-'.join(words)}", world, " and ".join(words), needs)
    for (case, reference, provider), seconds in STEP_SECONDS.items():
        for world, each in zip(("wan-1.3b", "wan-14b"), seconds, strict=True):
            yield measuring(
                f"{world}-{case}-{provider}", world, f"{case} and ({reference} or {provider})",
                (*BENCHMARKS, "prfl.build"), "bench/bench_steps.py", STEPS, each, "--benchmark-min-rounds=2",
            )  # fmt: skip
    for world in ("wan-1.3b", "wan-14b"):
        yield from of_pieces(world)
    for name in PREDICTED:
        script = "bench/measured_memory.py"
        of = (*STEPS, "prfl/forecast", script)
        slug = name.replace(",", "").replace(" ", "-")
        yield Piece(f"memory-{slug}", (script, "--case", name), of, (*BENCHMARKS, "prfl.build"), 150, "--out")


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
