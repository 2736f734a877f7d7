"""The texts of options as values, errors that name the config or the option, and the terminal's encoding."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prfl.config import Config
from prfl.config.messages import all_keys
from prfl.config.places import both_places
from prfl.utils.errors import AbsentError, PrflError


def add_command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """Add a command, or an action of one, whose help begins with what it does and shows its examples."""
    description = f"{summary[0].upper()}{summary[1:]}.\n\n{examples}"
    return commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def questions(text: str) -> dict[str, str]:
    """Read NAME,NAME or NAME=QUESTION, or several with a comma between; a comma is part of a question otherwise."""
    parts = re.split(r",\s*(?=[\w .-]+=)", text) if "=" in text else names(text)
    named = [part.partition("=") for part in parts]
    if any(not name.strip() for name, _, _ in named):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of questions, as motion=Which moves better?")
    return {name.strip(): question.strip() for name, _, question in named}


def numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, as 0,0.5,0.9") from None


def span(text: str) -> tuple[float, float]:
    try:
        low, high = text.split(":")
        return float(low), float(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no LOW:HIGH, as 1:5") from None


def config_of(options: argparse.Namespace) -> str | Path | None:
    """Return the file that a bare yaml path in an error is of: the config, or that of the run that is named."""
    run = getattr(options, "run", None)
    return run / "config.yaml" if options.config is None and isinstance(run, Path) else options.config


@contextmanager
def in_file(path: str | Path | None) -> Iterator[None]:
    """Put the config's file in front of a bare yaml path in an error, as ``configs/x.yaml: reward.space``.

    Of a file that is not there, name the key and both places where it was sought.
    """
    try:
        yield
    except PrflError as error:
        if path is not None and isinstance(error, AbsentError) and os.path.isfile(path):
            if both := both_places(Path(path), error):
                raise both from error
        if path is None or error.where not in {key for key, _ in all_keys(Config)}:
            raise
        raise PrflError(error.what, where=f"{path}: {error.where}", fix=error.fix) from error


@contextmanager
def by_option(keys: dict[str, str]) -> Iterator[None]:
    """Name, in an error of a command that has no config, the option in place of the yaml key."""
    try:
        yield
    except PrflError as error:
        if error.where not in keys:
            raise
        fix = error.fix.replace(f"{error.where}", keys[error.where]).replace("device: auto", "--device auto")
        raise PrflError(error.what, where=keys[error.where], fix=fix) from error


def print_any_name() -> None:
    """Print characters that the terminal's encoding lacks by their numbers: they must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
