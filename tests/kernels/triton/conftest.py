"""The Triton sources themselves: compiled on a GPU, or interpreted where TRITON_INTERPRET=1 was set at the start.

Without a GPU ``tests/kernels/test_interpreted.py`` runs this folder in a process that has it set.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from prfl_kernels.dispatch import interpreting

REASON = "needs a GPU, or TRITON_INTERPRET=1 in a process of its own (test_interpreted.py starts one)"
CAN_RUN = find_spec("triton") is not None and (torch.cuda.is_available() or interpreting())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not CAN_RUN and "kernels/triton/" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def device() -> str:
    return "cpu" if interpreting() else "cuda"


@pytest.fixture(params=["float32", "float64", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param == "bfloat16" and interpreting():
        pytest.skip("Triton's interpreter computes bfloat16 wrongly, and truncates to it")
    return getattr(torch, request.param)
