"""The bar of a run on a terminal: bar, steps and time left at any width, and as many numbers as there is room for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

LONGEST_STEP = 6 * 3600.0  # seconds over which the speed is measured: rich's own 30 hold no two steps of a minute


class WholeNumbers:
    """Shows as many of some texts, each a number with its name, as fit on one line: a number cut in two misleads."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(fitting(self.texts, options.max_width), no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, len("  ".join(self.texts)))


class NumbersColumn(ProgressColumn):
    """The task's field ``numbers``, cut to the room that the bar, the steps and the time leave on the line."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(ratio=1, no_wrap=True))

    def render(self, task: Task) -> WholeNumbers:
        return WholeNumbers(task.fields["numbers"])


def fitting(texts: Sequence[str], width: int) -> str:
    """Join the first texts that fit into ``width`` columns together."""
    count = len(texts)
    while count and len("  ".join(texts[:count])) > width:
        count -= 1
    return "  ".join(texts[:count])


def make_bar(console: Console) -> Progress:
    """Make a bar for tasks with a field ``numbers``: a list of texts.  Only their column gives way."""
    return Progress(
        BarColumn(min(40, console.width // 5), table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        NumbersColumn(),
        console=console,
        expand=True,
        speed_estimate_period=LONGEST_STEP,
    )
