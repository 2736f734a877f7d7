"""Every kernel compiled for GPUs that are not here: no spill but a stated one, shared memory within the limits, matrix
products by the instructions of each GPU, and none of them computed twice."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from prfl_kernels import attention_builds, attention_triton
from prfl_kernels.ahead import CAPABILITIES, SHARED_LIMIT, Build, Resources, compile_ahead, count_instructions
from prfl_kernels.attention_triton import Tiles
from prfl_kernels.builds import every_build
from prfl_kernels.lora_linear_triton import COLUMNS, ROWS, _block, _down_stages
from tests.slow import slow_unless

TABLES = json.loads((Path(__file__).parents[2] / "bench/results/compiled_kernels.json").read_text())["triton"]
EVERY = [(build, capability) for capability in CAPABILITIES for build in every_build(capability)]


def faults(build: Build, capability: int, used: Resources | None = None) -> list[str]:
    used = used or compile_ahead(build, capability)
    wanted = Resources(
        registers=used.registers,
        spilled=min(used.spilled, build.spill),
        shared=min(used.shared, SHARED_LIMIT[capability]),
        matrix=build.instruction(capability),
        work=1.0 if build.matrices else None,
    )
    pairs = zip(Resources._fields, used, wanted, strict=True)
    return [f"{name} {found}, not {right}" for name, found, right in pairs if found != right]


# The first build of each operation on the newest GPU with tables; the others break in this folder alone.
FIRST = list({build.name.split()[0]: (build, 90) for build in reversed(every_build(90))}.values())
BUILDS = slow_unless(FIRST.__contains__, EVERY)


@pytest.mark.parametrize(("build", "capability"), BUILDS, ids=lambda each: getattr(each, "name", f"sm_{each}"))
def test_a_kernel_compiles_to_what_it_needs(build: Build, capability: int) -> None:
    used = compile_ahead(build, capability)
    assert not faults(build, capability, used)
    if version("triton") in TABLES:  # python bench/compiled_kernels.py writes them
        tabled = TABLES[version("triton")]["kernels"][build.name][f"sm_{capability}"]
        assert {name: tabled[name] for name in Resources._fields} == used._asdict()


def test_what_would_not_fit_a_small_card_is_seen() -> None:
    """Three tiles on their way, as a large card has them, beside two: 147 KB of Hopper's, 115 of these."""
    stages = {capability: _down_stages(torch.bfloat16, 128, SHARED_LIMIT[capability]) for capability in CAPABILITIES}
    assert stages == {80: 3, 89: 2, 90: 3, 100: 3, 120: 2}
    large = next(each for each in every_build(90) if each.name == "lora_down r128")
    for capability in (89, 120):
        (fault,) = faults(large, capability)
        assert fault.startswith("shared 115712, not ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [16, 32, 64, 128])
def test_the_tiles_on_their_way_fit_every_card(rank: int, dtype: torch.dtype) -> None:
    block = _block(rank, dtype)
    for limit in SHARED_LIMIT.values():
        stages = _down_stages(dtype, block, limit)
        assert stages >= 1 and stages * (ROWS + block) * COLUMNS * dtype.itemsize <= limit


def test_hoppers_own_instruction_multiplies_wherever_a_tile_has_its_rows() -> None:
    kinds = {build.name: build.instruction(90) for build in every_build(90)}
    attention = {name: kind for name, kind in kinds.items() if name.startswith("attention") and "bf16" in name}
    assert len(attention) == 10 and set(attention.values()) == {"wgmma"}
    small = {name for name, kind in kinds.items() if kind == "mma"}
    assert small == {"lora_grad_a Normed r16", "lora_grad_a Gelu r16"}


def test_gelu_is_one_exponential_and_one_division() -> None:
    """Of 8192 elements by 8 warps: a sigmoid's range checks took 747 instructions a pass on sm_90."""
    build = next(each for each in every_build(90) if each.name == "lora_grad_a Gelu r64")
    assert count_instructions(build, 90).loop < 620


@pytest.mark.slow
def test_cosines_and_sines_are_read_in_one_go() -> None:
    """8 scalar loads a thread where the tables have every value twice; what is left in the backward is rstd."""
    builds = [each for each in every_build(90) if each.name.startswith("qk_norm_rope")]
    assert {build.name: count_instructions(build, 90).narrow_loads for build in builds} == {
        build.name: int("backward" in build.name) for build in builds
    }


def test_a_tile_that_two_warpgroups_compute_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight warps over 64 queries, as the query gradient once had them on every GPU."""
    monkeypatch.setattr(attention_triton, "tiles", lambda *_: Tiles(64, 64, 8, 2))
    build = next(each for each in attention_builds.builds(9) if "query gradient" in each.name)
    assert faults(build, 80) == []
    (fault,) = faults(build, 90)
    assert fault.startswith("work 1.66")


def test_products_that_are_missing_are_seen() -> None:
    build = next(each for each in attention_builds.builds(8) if "fp32" in each.name)
    wanting = dataclasses.replace(build, matrices=((16, 32, 128),))
    assert faults(wanting, 80) == ["matrix , not mma", "work 0.0, not 1.0"]


def test_the_committed_tables() -> None:
    """Of the oldest Triton and of a newer one, the same kernels on every GPU, and nothing computed twice."""
    tables = {triton: table["kernels"] for triton, table in TABLES.items()}
    assert {"3.6.0", "3.9.0"} <= tables.keys()
    for kernels in tables.values():
        for capability in CAPABILITIES:
            builds = {build.name: build for build in every_build(capability)}
            found = {name: each[f"sm_{capability}"] for name, each in kernels.items()}
            assert found.keys() == builds.keys()
            for name, used in found.items():
                build = builds[name]
                assert used["spilled"] <= build.spill and used["matrix"] == build.instruction(capability), name
                assert used["work"] == (1.0 if build.matrices else None), name
