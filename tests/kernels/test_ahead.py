"""Every kernel compiled for GPUs that are not here: no spill but a stated one, and shared memory within the limits."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from prfl_kernels.ahead import CAPABILITIES, SHARED_LIMIT, Build, compile_ahead
from prfl_kernels.builds import every_build


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("build", every_build(), ids=lambda build: build.name)
def test_a_kernel_compiles_without_a_spill(build: Build, capability: int) -> None:
    used = compile_ahead(build, capability)
    assert used.registers > 0 and used.spilled <= build.spill and used.shared <= SHARED_LIMIT[capability]
