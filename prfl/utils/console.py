"""Where the commands print, and their progress."""

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
    """A console that shows text as it is, in lines, in tables and in their titles: users wrote the names and prompts.

    No markup (``[/10]``), no emoji codes (``:bar:``), no control characters.  Styles are arguments.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.warnings: set[str] = set()  # those that were printed

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})

    def say(self, text: str, style: str = "") -> None:
        """Print sentences: a terminal breaks them between words, and a file has every line whole, for a search."""
        lines = wrapped(text, self.width) if self.is_terminal else text
        self.print(lines, style=style, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Warn of what does not stop the work.  The same words are printed once a command."""
        if text not in self.warnings:
            self.warnings.add(text)
            self.say(f"warning: {text}", style="bold yellow")


console, messages = PlainConsole(), PlainConsole(stderr=True)
if not console.is_terminal:
    console = PlainConsole(width=140)  # a file takes 80 columns otherwise, and the tables lose their first one


def warn(text: str) -> None:
    """Warn on the console, as ``PlainConsole.warn`` does."""
    console.warn(text)


def forget_warnings() -> None:
    """Let another command in this process print its own warnings."""
    console.warnings.clear()
    messages.warnings.clear()


def progress(description: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Return what shows the progress through items: a bar on a terminal, else one line when the work begins."""

    def shown(items: Iterable[Any]) -> Iterable[Any]:
        if console.is_terminal:
            return track(items, description=description, console=console, transient=True)
        console.print(description)
        return items

    return shown


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Print nothing of what the libraries log, inside, nor their bars.

    They log an error of theirs before they raise it, and a bar of theirs breaks ours.
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
