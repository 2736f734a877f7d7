"""The choice of attention: by name, by variable, by itself; tried before it is believed."""

from __future__ import annotations

import sys
import types
from typing import Any, get_args

import pytest
import torch

from prfl.backbone import attention
from prfl.backbone.attention import NAMES, attend, choose_attention, why_not
from prfl.backbone.wan.model import WanBackbone
from prfl.config.sections.backbone import BackboneConfig
from tests.backbone.test_kernels import assert_close, computed, with_adapter
from tests.slow import slow_unless

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(attention.VARIABLE, raising=False)


def test_the_config_knows_the_same_names() -> None:
    assert get_args(BackboneConfig.model_fields["attention"].annotation) == ("auto", *NAMES)


def test_by_itself_torch_chooses() -> None:
    assert choose_attention("auto", "cpu", torch.float32, 12).backend == "sdpa"


def test_it_is_tried_too_where_a_model_is_built_without_memory() -> None:
    """As `prfl train --dry-run` builds it, beside a GPU whose attention is asked for."""
    with torch.device("meta"):
        assert why_not("sdpa", CPU, torch.float32, 16) == ""


def test_a_choice_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(attention.VARIABLE, "triton")
    assert choose_attention("sdpa", "cpu", torch.float32, 12) == ("sdpa", "chosen explicitly")
    with pytest.raises(ValueError, match="attention by triton, chosen by PRFL_ATTENTION, cannot run here: .* a GPU"):
        choose_attention("auto", "cpu", torch.float32, 12)
    monkeypatch.setenv(attention.VARIABLE, "fastest")
    with pytest.raises(ValueError, match="'fastest' is none of sdpa, "):
        choose_attention("auto", "cpu", torch.float32, 12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what cannot run on a CPU")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("sdpa", "flash")])
def test_what_cannot_run_here_says_why(name: str) -> None:
    with pytest.raises(ValueError, match=f"attention by {name}, chosen explicitly, cannot run here: .+"):
        choose_attention(name, "cpu", torch.bfloat16, 64)


def test_a_package_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert "not installed: pip install xformers" == why_not("xformers", CPU, torch.float32, 16)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda right: 1.2 * right, "off plain softmax"),
        (lambda right: right.detach(), "does not require grad"),
    ],
    ids=["another scale", "no gradient"],
)
def test_one_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: Any, reason: str) -> None:
    assert why_not("sdpa", CPU, torch.float32, 16) == ""
    monkeypatch.setattr(attention, "attend", lambda backend, *tensors: wrong(attend(backend, *tensors)))
    assert reason in why_not("sdpa", CPU, torch.float32, 16)


def test_trying_another_leaves_what_a_run_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    active = [None]
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: active[-1])
    monkeypatch.setattr(attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(attention, "restore_flash_attention_impl", lambda: active.append(None))
    attention.activate("flash_3")
    assert active[-1] == "FA3"
    assert why_not("sdpa", CPU, torch.float32, 16) == why_not("flash_4", CPU, torch.float32, 16) == ""
    assert active[-1] == "FA3" and "FA4" in active
    attention.activate("sdpa")
    assert active[-1] is None


@pytest.mark.parametrize("backend", ["triton", "flash", "sdpa"])
@pytest.mark.parametrize("which", [(), ("lora_linear",)])
@pytest.mark.parametrize("mode", slow_unless("attention".__ne__, ["none", "attention", "full"]))
def test_the_same_whichever_attends(
    tiny_backbone: WanBackbone, which: tuple[str, ...], mode: Any, backend: str
) -> None:
    """What runs on a CPU (of ours the torch path), with text folded into fewer tokens, which carry a bias."""
    backbone = with_adapter(tiny_backbone)
    expected = computed(backbone)
    backbone.running.checkpointing = mode
    backbone.use_kernels(which, backend)
    assert_close(computed(backbone), expected)
    backbone.use_kernels((), "sdpa")
    assert_close(computed(backbone), expected)


@pytest.mark.parametrize(
    ("capability", "dtype", "runs", "backend", "reason"),
    [
        ((9, 0), torch.bfloat16, ("flash_3", "flash_4"), "flash_3", "the text's by sdpa"),
        ((10, 0), torch.float16, ("flash_3", "flash_4"), "flash_4", "the text's by sdpa"),
        ((9, 0), torch.bfloat16, ("flash_4",), "flash_4", "the text's by sdpa"),
        (
            (9, 0),
            torch.bfloat16,
            (),
            "sdpa",
            "flash_3 does not run here: not installed; flash_4 does not run here: not",
        ),
        ((10, 0), torch.bfloat16, ("flash_3",), "sdpa", "flash_4 does not run here: not installed"),
        ((8, 0), torch.bfloat16, ("flash_3", "flash_4"), "sdpa", "none is known to be faster"),
        ((9, 0), torch.float32, ("flash_3", "flash_4"), "sdpa", "torch picks"),
    ],
)
def test_by_itself_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, runs: tuple[str, ...],
    backend: str, reason: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "why_not", lambda name, *more: "" if name in runs else "not installed")
    choice = choose_attention("auto", "cuda", dtype, 128)
    assert choice.backend == backend and reason in choice.reason
