"""The switch: explicit choice, then the variable, then automatic; an impossible choice is an error."""

from __future__ import annotations

import pytest
import torch

from prfl_kernels import choose_backend, dispatch


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


@pytest.fixture
def with_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "OPERATIONS", ("x",))
    monkeypatch.setattr(dispatch, "AUTOMATIC", {"x": "it is fast"})
    monkeypatch.setattr(dispatch, "passed", lambda device: frozenset({"x"}))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)


def test_an_explicit_triton_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "OPERATIONS", ("x",))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton, chosen explicitly, cannot run x: triton is not installed"):
        choose_backend("x", "triton")
    monkeypatch.setenv("PRFL_KERNELS", "triton")
    with pytest.raises(ValueError, match="triton, chosen by PRFL_KERNELS, cannot run x: triton is not installed"):
        choose_backend("x")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="it needs a GPU, and this runs on cpu"):
        choose_backend("x")
    with pytest.raises(ValueError, match="it takes float32, bfloat16, float16, not torch.float64"):
        choose_backend("x", "triton", "cuda", torch.float64)
    assert choose_backend("x", "torch").backend == "torch"


@pytest.mark.parametrize(
    ("request_", "variable", "choice"),
    [
        ("torch", "triton", ("torch", "chosen explicitly")),
        ("triton", "torch", ("triton", "chosen explicitly")),
        ("auto", "torch", ("torch", "chosen by PRFL_KERNELS")),
        (None, "triton", ("triton", "chosen by PRFL_KERNELS")),
        (None, "auto", ("triton", "automatic: its compiled tests have passed here; it is fast")),
        (None, "", ("triton", "automatic: its compiled tests have passed here; it is fast")),
    ],
)
def test_order_of_precedence(
    with_kernel: None, monkeypatch: pytest.MonkeyPatch, request_: str | None, variable: str, choice: tuple[str, str]
) -> None:
    monkeypatch.setenv("PRFL_KERNELS", variable)
    assert choose_backend("x", request_) == choice


def test_automatic_takes_only_what_passed_its_tests_here(with_kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "passed", lambda device: frozenset())
    assert choose_backend("x").backend == "torch"
    assert "its compiled tests have not passed on this machine" in choose_backend("x").reason
    assert choose_backend("x", "triton").backend == "triton"
    monkeypatch.setattr(dispatch, "AUTOMATIC", {})
    assert choose_backend("x").reason == ("automatic: not yet shown to be faster on a GPU; choose triton to have it")


def test_attention_is_torchs_by_itself() -> None:
    assert {*dispatch.OPERATIONS} - {*dispatch.AUTOMATIC} == {"attention"}
    assert "memory, not for its speed" in dispatch.AUTOMATIC["lora_linear"]


def test_unknown_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'attend' is none of lora_linear, "):
        choose_backend("attend")
    with pytest.raises(ValueError, match="chosen explicitly: 'cuda' is none of auto, torch, triton"):
        choose_backend("lora_linear", "cuda")
    monkeypatch.setenv("PRFL_KERNELS", "Triton")
    with pytest.raises(ValueError, match="chosen by PRFL_KERNELS: 'Triton' is none of"):
        choose_backend("lora_linear")
