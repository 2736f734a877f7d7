"""The stamp of compiled tests that passed: by machine and sources, and never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from prfl_kernels import passed
from tests.kernels.triton.conftest import Verdict, verdicts
from tests.slow import slow_unless


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(passed, "_driver", lambda: "570.1")


def test_without_a_gpu_nothing_has_passed() -> None:
    passed.stamp_file().parent.mkdir()
    passed.stamp_file().write_text('{"": {"attention": true}}')
    assert passed.passed("cpu") == frozenset()


def test_results_are_kept_by_machine(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    passed.record({"attention": True, "lora_linear": False})
    passed.record({"qk_norm_rope": True})
    assert passed.passed() == {"attention", "qk_norm_rope"}
    passed.record({"attention": False})  # a later failure counts
    assert passed.passed() == {"qk_norm_rope"}
    monkeypatch.setattr(passed, "_driver", lambda: "580.1")
    assert passed.passed() == frozenset()
    monkeypatch.setattr(passed, "_driver", lambda: "570.1")
    assert passed.passed() == {"qk_norm_rope"}


def test_other_sources_are_not_what_passed(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    passed.record({"attention": True})
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"edited")
    assert passed.passed() == frozenset()


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_spoilt_stamp_is_none(gpu: None, text: str) -> None:
    passed.stamp_file().parent.mkdir()
    passed.stamp_file().write_text(text)
    assert passed.passed() == frozenset()
    passed.record({"attention": True})
    assert passed.passed() == {"attention"}


@pytest.mark.parametrize(
    ("ran", "wanted"),
    [
        ({"test_attention.py": {"passed"}}, {"attention": True}),
        ({"test_attention.py": {"passed", "skipped"}}, {"attention": True}),
        ({"test_attention.py": {"passed", "failed"}}, {"attention": False}),
        ({"test_attention.py": {"skipped"}}, {}),
        ({"test_lora_linear.py": {"passed", "left out"}}, {}),  # by -k, by -x
        ({"test_lora_linear.py": {"failed", "left out"}}, {"lora_linear": False}),
        ({"test_attention.py": {"passed"}, "test_operations.py": {"failed"}}, {"attention": False}),
        ({"test_operations.py": {"passed"}}, {}),
    ],
)
def test_only_a_whole_file_without_a_failure_is_a_pass(ran: dict[str, set[str]], wanted: dict[str, bool]) -> None:
    assert verdicts(ran) == wanted


@pytest.mark.parametrize(
    ("more", "wanted"),
    slow_unless(
        lambda case: case[0] == ("-k", "not other"),
        [
            ((), {"attention": True, "lora_linear": False}),
            (("-k", "not other"), {"lora_linear": False}),
            (("-x",), {"attention": True, "lora_linear": False}),
            (("{}/test_attention.py::test_one",), {}),
        ],
    ),
)
def test_what_a_run_leaves(tmp_path: Path, more: tuple[str, ...], wanted: dict[str, bool]) -> None:
    """Of a file with a test that is skipped, and of one with a failure; a file that is not of the folder is nothing."""
    folder = tmp_path / "triton"
    folder.mkdir()
    one = "import pytest\ndef test_one(): pass\ndef test_other(): pytest.skip('here')\n"
    (folder / "test_attention.py").write_text(one)
    (folder / "test_qk_norm_rope.py").write_text("import pytest\ndef test_other(): pytest.skip('here')\n")
    (folder / "test_lora_linear.py").write_text("def test_one(): assert 0\ndef test_two(): pass\n")
    (tmp_path / "test_gated_residual_norm.py").write_text("def test_one(): pass\n")
    found: dict[str, bool] = {}
    arguments = [str(tmp_path), *more] if not more or "{}" not in more[0] else [more[0].format(folder)]
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={tmp_path}", "-c", os.devnull]
    pytest.main([*options, *arguments], plugins=[Verdict(folder, found.update)])
    assert found == wanted
