"""Every fault that stops prfl, planted for real: the message says what is wrong, where, and how to mend it, in one
error without a traceback, and nothing half done is left behind.

A module of this folder called ``*_faults.py`` adds its faults to the table; ``python -m tests.faults`` prints the
table of faults and messages as markdown.
"""

from __future__ import annotations

import importlib
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prfl import cli
from prfl.config.places import shipped_configs
from tests.faults.page import PAGE, read
from tests.faults.planting import FAULTS, Bench, Fault

for module in sorted(Path(__file__).parent.glob("*_faults.py")):
    if module.name != Path(__file__).name:
        importlib.import_module(f"tests.faults.{module.stem}")

WRITTEN = read(PAGE.read_text(encoding="utf-8"))
ONE, TWO = Path("runs/sft/checkpoints/step-000001"), Path("runs/sft/checkpoints/step-000002")


def without_numbers(text: str) -> str:
    """Versions, sizes, times, hashes and measured values differ from machine to machine."""
    return re.sub(r"\b[0-9a-f]{8,}\b|[0-9]+", "0", text)


@pytest.mark.parametrize("planted", FAULTS, ids=lambda planted: planted.name)
def test_fault(planted: Fault, bench: Bench, record_property: Callable) -> None:
    message = planted.plant(bench)
    shown = message.replace(str(bench.folder), ".").replace(str(bench.model), "MODEL")
    shown = shown.replace(str(shipped_configs()), "CONFIGS")
    record_property("section", (sys.modules[planted.plant.__module__].__doc__ or "").splitlines()[0].rstrip("."))
    record_property("fault", planted.name)
    shown = shown.replace(f" on {socket.gethostname()} ", " on this machine ")
    record_property("message", shown)
    update = "python -m tests.faults --update docs/troubleshooting.md"
    assert planted.name in WRITTEN and without_numbers(WRITTEN[planted.name].message) == without_numbers(shown), update
    for part in planted.parts:
        assert part in message, message
    assert "Traceback" not in message
    lines = message.splitlines()
    assert len(lines) == len(set(lines)) and message.count("To mend it") <= 1, f"doubled: {message}"
    if not planted.refused:
        return
    assert message.count("\n") <= 3, message
    strange = {name for name in bench.changed if not name.startswith(planted.leaves or ("nothing",))}
    assert not strange, f"files that were changed or left: {sorted(strange)}"
    assert not [name for name in bench.files() if ".tmp" in name or ".old" in name]


def test_there_are_enough_of_them() -> None:
    names = [planted.name for planted in FAULTS]
    assert len(names) == len(set(names)) >= 160


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on(bench: Bench) -> None:
    """auto: a run that a scheduler starts again must not need a person; but it says what it does."""
    before = {path.name: path.read_bytes() for path in TWO.iterdir()}
    metrics = Path("runs/sft/metrics.jsonl").read_text()
    (TWO / "optimizer.safetensors").write_bytes(b"")
    bench.capsys.readouterr()
    assert cli.main(["train", "sft.yaml"]) == 0
    said = bench.capsys.readouterr().out
    assert f"{TWO} is damaged: it is now called damaged-step-000002" in said.replace("\n", "")
    again = {path.name: path.read_bytes() for path in TWO.iterdir()}
    assert again == before, "the same step, trained again from the one before, is the same bit for bit"
    own = r'"(?:seconds|peak_gib)[^,}]*'  # of the process, not of the training
    timeless = [re.sub(own, "", text) for text in (metrics, Path("runs/sft/metrics.jsonl").read_text())]
    assert timeless[0] == timeless[1]


def test_no_pickle_is_loaded_and_no_remote_code_is_trusted() -> None:
    """In the sources; torch.load only with weights_only=True."""
    root = Path(cli.__file__).parent
    sources = {path: path.read_text() for folder in (root, root.parent / "kernels") for path in folder.rglob("*.py")}
    assert len(sources) > 50
    for path, text in sources.items():
        assert not re.search(r"pickle\.(?:loads?|Unpickler)\b|\b(?:dill|joblib|marshal|shelve)\b", text), path
        assert not re.search(r"allow_pickle\s*=\s*True|trust_remote_code\s*=\s*(?!False)", text), path
        assert not re.search(r"yaml\.(?:unsafe_|full_)?load\((?!text, StrictLoader)", text), path
        for call in re.finditer(r"torch\.load\(", text):
            assert "weights_only=True" in text[call.start() : call.start() + 200], path
        weights = r"(?:WanTransformer3DModel|AutoencoderKLWan|UMT5EncoderModel|CLIPModel|kind)\.from_pretrained\("
        for call in re.finditer(weights, "" if path.name == "card.py" else text):  # a card shows code to its reader
            assert "use_safetensors=True" in text[call.start() : call.start() + 300], path
