"""What the doctor sees, and what it calls a reason not to run."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from prfl import cli
from prfl.config import load_config
from prfl.estimate.protection import NOT_PROTECTED, PROTECTED
from prfl.factory.backbone import OPERATIONS, build_architecture
from prfl.runs import machine
from prfl.runs.machine import Check

REPOSITORY = Path(__file__).parents[2]
TINY = str(REPOSITORY / "configs/tiny/sft.yaml")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's answer is not waited for, and nothing is downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(REPOSITORY)
    machine.hub.cache_clear()


def test_the_attention_that_ran_is_named() -> None:
    assert machine.attention("cpu", torch.float32).state == "flash_attention_for_cpu"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert machine.attention("cpu", torch.bfloat16).state.startswith("plain softmax, not fused")


def test_a_kernel_that_cannot_run_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PRFL_KERNELS", "PRFL_ATTENTION"):
        monkeypatch.delenv(variable, raising=False)
    here = machine.choices()
    assert [check.name for check in here] == [*(f"kernel {name}" for name in OPERATIONS), "attention chosen"]
    assert not here[0].problem and here[-1].state.startswith("sdpa (automatic")
    asked = load_config(TINY, ["backbone.kernels={lora_linear: triton}", "backbone.device=cpu"])
    model = build_architecture(load_config(TINY, []))
    (refused,) = machine.choices(asked, model)
    assert "cannot run lora_linear: it needs a GPU, and this runs on cpu" in refused.problem
    asked = load_config(TINY, ["backbone.attention=flash", "backbone.device=cpu"])
    assert machine.choices(asked, model)[-1].state == "flash (chosen explicitly)"
    monkeypatch.setenv("PRFL_KERNELS", "cuda")
    assert "none of auto, torch, triton" in machine.choices()[0].problem


def test_packages() -> None:
    assert machine.package("torch").state == version("torch")
    assert machine.package("no-such-package").problem == "pip install no-such-package"


def test_a_machine_that_can(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["doctor", TINY]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "device", "attention", "attention chosen", "hub", "PyAV", "disk", "predicted"):
        assert word in shown, word


FAULTS = [
    (
        ["backbone.device=cpu"],
        {"available": lambda kind: 1 << 20, "advice": lambda config: "try a.b=1"},  # which has tests of its own
        "memory: 0.",
        "GiB more than is free; try a.b=1",
    ),
    ([], {"shutil.disk_usage": lambda place: type("Usage", (), {"free": 10})}, "disk: ", "need"),
    (["data.prompts.train=absent.txt"], {}, "data.prompts: ", "absent.txt"),
    (["training.trackers=[tensorboard, aim]"], {}, "training.trackers: pip install aim", "or leave it out"),
    (["data.generator=null", "data.manifest=absent.jsonl"], {}, "data.manifest: ", "there is no file absent.jsonl"),
    (["backbone.model=Wan-AI/Wan2.1-T2V-1.3B-Diffusers"], {}, "backbone.model: it is not here", "HF_HUB_OFFLINE"),
]


@pytest.mark.parametrize(("overrides", "patches", "name", "reason"), FAULTS, ids=[fault[2] for fault in FAULTS])
def test_reasons(overrides, patches, name, reason, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for target, replacement in patches.items():
        monkeypatch.setattr(f"prfl.runs.machine.{target}", replacement)
    monkeypatch.setattr(machine, "check_machine", list)
    monkeypatch.setattr("prfl.runs.doctor.check_machine", list)
    if "available" not in patches:  # the prediction has its own tests, and takes its time
        monkeypatch.setattr(machine, "memory", lambda *given: Check("memory", ""))
    assert cli.main(["doctor", TINY, *overrides]) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if f": {name}" in line)
    assert line.strip().startswith(TINY) and reason in line


def test_all_that_has_to_be_downloaded_is_named() -> None:
    """The video model, and the CLIP of the aesthetic score."""
    found = list(machine.inputs(load_config("configs/wan2.1-1.3b/vader.yaml"), ()))
    named = {check.name: check.problem for check in found}
    for key in ("backbone.model", "reward.aesthetic.clip"):
        assert "it is not here" in named[key] and "HF_HUB_OFFLINE" in named[key]
    assert "there is no file" in named["reward.aesthetic.mlp"]
    assert list(machine.downloads(load_config(TINY))) == []


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(machine, "memory", lambda *given: Check("memory", ""))
    monkeypatch.setattr("prfl.runs.doctor.check_machine", list)
    assert cli.main(["doctor", TINY, "backbone.device=cuda"]) == 2
    assert "backbone.device: there is no usable GPU here; take auto or cpu" in capsys.readouterr().err


def test_what_is_not_protected_is_said_here_and_in_the_docs() -> None:
    told = {check.name: check.state for check in machine.check_machine()}
    page = " ".join((REPOSITORY / "docs/usage.md").read_text().split())
    assert len(NOT_PROTECTED) > 5 and told["protected"] == PROTECTED
    for name, text in NOT_PROTECTED.items():
        assert told[f"not protected: {name}"] == text
        assert f"**{name}**: {text}" in page


def test_a_reason_is_given_once_and_names_both_places(tmp_path: Path, monkeypatch, capsys) -> None:
    """The table has what there is; the reasons come last, each with its remedy, and none with another's."""
    monkeypatch.chdir(tmp_path)
    text = Path(TINY).read_text().replace("train: shapes", "train: mine.txt")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/own.yaml").write_text(text)
    monkeypatch.setattr(machine, "memory", lambda *given: Check("memory", ""))
    monkeypatch.setattr("prfl.runs.doctor.check_machine", list)
    assert cli.main(["doctor", "here/own.yaml"]) == 2
    printed = capsys.readouterr()
    reason = "data.prompts: there is no such file: mine.txt, nor here/mine.txt (name a file that is there)"
    assert printed.err.splitlines() == ["prfl doctor: a run could not work here", f"  here/own.yaml: {reason}"]
    assert "no such file" not in printed.out and "missing" in printed.out


def test_of_a_gpu_no_other_config_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes seconds of a large model, and the dry run has them."""
    monkeypatch.setattr(machine, "advice", lambda config: pytest.fail("predicted another config"))
    config = load_config(TINY, ["backbone.device=cuda"])
    check = machine.memory(config, build_architecture(config), free=1)
    assert "GiB more than is free; `prfl train` of it with --dry-run --gpu" in check.problem


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = {check.name: check.state for check in machine.attentions()}
    for name in ("cudnn", "flash_3", "flash_4", "triton"):
        assert told[f"attention by {name}"] == "not here: it needs a GPU, and this runs on cpu"
    for text in told.values():
        assert not any(word in text for word in ("No module", "viable", "Error", "likely"))
    monkeypatch.setattr("prfl.runs.machine.shutil.which", lambda name: name)
    monkeypatch.setattr(machine, "driver", lambda: "570.1")
    assert "there is a GPU (driver 570.1), and torch" in machine.no_gpu() and "pytorch.org" in machine.no_gpu()
