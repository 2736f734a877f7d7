"""Where the commands print, and their progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.progress import track
from rich.text import Text
from transformers.utils import logging as transformers_logging

from prfl.utils.text import visible


class PlainConsole(Console):
    """A console that shows text as it is, in lines, in tables and in their titles: users wrote the names and prompts.

    No markup (``[/10]``), no emoji codes (``:bar:``), no control characters.  Styles are arguments.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})


console = PlainConsole()
if not console.is_terminal:
    console = PlainConsole(width=140)  # a file takes 80 columns otherwise, and the tables lose their first one


def warn(text: str) -> None:
    """Warn, in one line, of what does not stop the work."""
    console.print(f"warning: {text}", style="bold yellow", markup=False, soft_wrap=True)


def progress(description: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Return what shows the progress through items: a bar on a terminal, else one line when the work begins."""

    def shown(items: Iterable[Any]) -> Iterable[Any]:
        if console.is_terminal:
            return track(items, description=description, console=console, transient=True)
        console.print(description)
        return items

    return shown


def disable_progress_bars() -> None:
    """Switch off the bars that the libraries show while they load a model."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
