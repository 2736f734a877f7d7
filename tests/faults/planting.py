"""How a fault is planted, run into and written into the table."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from prfl import cli
from prfl.utils.errors import PrflError
from tests.tiny import save_tiny_pipeline


@dataclass
class Bench:
    """What a fault is planted in, and how it is then run into."""

    patch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture
    model: Path
    folder: Path
    changed: set[str] = field(default_factory=set)  # files that are there, gone or other after the refusal

    def cli(self, *arguments: str) -> str:
        """The message of a command that is refused."""
        return self.watched(lambda: self.fails(arguments))

    def fails(self, arguments: tuple[str, ...]) -> str:
        self.capsys.readouterr()
        assert cli.main(arguments) == 2
        return self.capsys.readouterr().err.rpartition("prfl: ")[2].strip()  # behind the libraries' own bars

    def warned(self, *arguments: str) -> str:
        """The warnings of a command that goes on to its end, one a line."""
        self.capsys.readouterr()
        assert cli.main(arguments) == 0
        printed = self.capsys.readouterr()
        lines = [line for text in (printed.out, printed.err) for line in text.splitlines()]
        return "\n".join(line for line in lines if line.lower().startswith("warning"))

    def call(self, function: Callable, *args: Any, **named: Any) -> str:
        """The message of a public function that refuses."""

        def refused() -> str:
            with pytest.raises(PrflError) as caught:
                function(*args, **named)
            return str(caught.value)

        return self.watched(refused)

    def watched(self, run: Callable[[], str]) -> str:
        before = self.files()
        message = run()
        after = self.files()
        self.changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        return message

    def files(self) -> dict[str, str]:
        """Every file with its hash; the cache's own are whole or absent by construction, only half ones count."""
        found = {str(p.relative_to(self.folder)): p for p in self.folder.rglob("*") if p.is_file() or p.is_symlink()}
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in found.items()
            if not name.startswith("cache/") or "tmp" in name
        }

    def rows(self, change: Callable[[list[dict]], None]) -> None:
        """Rewrite the manifest."""
        rows = [json.loads(line) for line in Path("manifest.jsonl").read_text().splitlines()]
        change(rows)
        Path("manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def other_model(self, name: str = "other", **changes: Any) -> str:
        return f"backbone.model={save_tiny_pipeline(self.folder / name, seed=1, **changes)}"

    def copied_model(self) -> Path:
        return Path(shutil.copytree(self.model, self.folder / "model"))


@dataclass(frozen=True)
class Fault:
    name: str
    parts: tuple[str, ...]  # of the message: what, where, how to mend it
    leaves: tuple[str, ...]  # the only places in which files may have changed
    plant: Callable[[Bench], str]
    refused: bool = True  # else it is warned of, and the command goes on


FAULTS: list[Fault] = []


def fault(name: str, *parts: str, leaves: tuple[str, ...] = ()) -> Callable:
    def register(plant: Callable[[Bench], str]) -> None:
        FAULTS.append(Fault(name, parts, leaves, plant))

    return register


def warning(name: str, *parts: str) -> Callable:
    """A fault that prfl warns of and goes on with; the planted function returns ``bench.warned(...)``."""

    def register(plant: Callable[[Bench], str]) -> None:
        FAULTS.append(Fault(name, parts, (), plant, refused=False))

    return register


def lying(path: Path) -> bytes:
    """A safetensors file whose header claims to be a terabyte long."""
    content = (2**40).to_bytes(8, "little") + path.read_bytes()[8:]
    path.write_bytes(content)
    return content
