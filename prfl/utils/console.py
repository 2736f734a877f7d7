"""The console that commands print to, and their progress bars."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.text import Text

from prfl.utils.text import visible, wrapped


class PlainConsole(Console):
    """A console that prints text literally, in lines and tables, because names and prompts are written by users.

    Markup (``[/10]``) and emoji codes (``:bar:``) are not interpreted, and control characters are escaped.  Styles are
    given as arguments.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.warnings: set[str] = set()  # warnings that were printed already

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})

    def say(self, text: str, style: str = "") -> None:
        """Print sentences.  On a terminal, lines are wrapped between words; in a file they stay whole, for a search."""
        lines = wrapped(text, self.width) if self.is_terminal else text
        self.print(lines, style=style, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning.  The same text is printed once per command."""
        if text not in self.warnings:
            self.warnings.add(text)
            self.say(f"warning: {text}", style="bold yellow")


console, messages = PlainConsole(), PlainConsole(stderr=True)
if not console.is_terminal:
    console = PlainConsole(width=140)  # the default for a file, 80 columns, would cut the tables


def warn(text: str) -> None:
    """Warn on the console, as ``PlainConsole.warn`` does."""
    console.warn(text)


def forget_warnings() -> None:
    """Let another command in this process print its own warnings."""
    console.warnings.clear()
    messages.warnings.clear()


def progress(description: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Return a wrapper of an iterable that shows progress: a bar on a terminal, otherwise one line at the start."""

    def shown(items: Iterable[Any]) -> Iterable[Any]:
        if console.is_terminal:
            return track(items, description=description, console=console, transient=True)
        console.print(description)
        return items

    return shown


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Suppress log messages and the progress bars of diffusers and transformers inside the block.

    These libraries log an error before they raise it, and their bars would break ours.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = logging.root.manager.disable
    shown = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
    logging.disable(logging.CRITICAL)
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(before)
        for library in shown:
            library.enable_progress_bar()
