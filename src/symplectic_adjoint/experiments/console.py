"""What a run shows in the terminal: live progress, then the table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from symplectic_adjoint.experiments.compare import Observer
from symplectic_adjoint.experiments.results import Results
from symplectic_adjoint.experiments.table import HEADINGS, findings, notes, row
from symplectic_adjoint.experiments.train import Session

_REPORT_WIDTH = 132
"""Width of the table where the output is no terminal that has one of its own."""
_LINES = 10
_WORDS = HEADINGS.index("exact") + 1
"""Columns of words come first, figures after them."""
_CUT = HEADINGS.index("peak\nmemory")
"""Where a table too wide for the terminal is cut."""


class Watcher(Observer, Protocol):
    """An observer that holds the terminal for the time of a with block."""

    def __enter__(self) -> Watcher: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def watcher(console: Console) -> Watcher:
    """Live bars in a terminal, now and then a line elsewhere."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


class LiveProgress:
    """A bar for each strategy, with its scores and its pace."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def trained(self, session: Session) -> None:
        """See ``Observer``."""
        total = session.config.iterations
        self._update(session.strategy, session.iteration, total, _pace(session))

    def failed(self, strategy: str, error: Exception) -> None:
        """See ``Observer``."""
        self._progress.console.print(f"[red]{strategy} stopped early:[/] {escape(str(error))}")
        self._progress.stop_task(self._task(strategy))

    def measuring(self, done: int, total: int, what: str) -> None:
        """See ``Observer``."""
        self._update("measuring", done, total, what)

    def _update(self, name: str, done: int, total: int, note: str) -> None:
        self._progress.update(self._task(name), completed=done, total=total, note=note)

    def _task(self, name: str) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=None, note="")
        return self._tasks[name]


class PlainProgress:
    """A line for each strategy at every tenth of its iterations."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def trained(self, session: Session) -> None:
        """See ``Observer``."""
        total = session.config.iterations
        if session.iteration % max(1, total // _LINES) == 0 or session.finished:
            self._print(f"{session.strategy:<11} {session.iteration}/{total} {_pace(session)}")

    def failed(self, strategy: str, error: Exception) -> None:
        """See ``Observer``."""
        self._print(f"{strategy} stopped early: {error}")

    def measuring(self, done: int, total: int, what: str) -> None:
        """See ``Observer``."""
        self._print(f"measuring   {done}/{total} {what}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_results(console: Console, results: Results) -> None:
    """Prints the table, what it says and how to read it."""
    for table in _tables(console, results):
        console.print(table)
    for line in findings(results):
        console.print(line, markup=False, highlight=False)
    console.print()
    for line in notes(results):
        console.print(line, markup=False, highlight=False, style="dim")


def _tables(console: Console, results: Results) -> list[Table]:
    """The table, cut in two where the terminal is too narrow for it."""
    every = range(len(HEADINGS))
    whole = _table(results, every)
    unbounded = console.options.update(max_width=sys.maxsize)
    if console.measure(whole, options=unbounded).maximum <= console.width:
        return [whole]
    return [_table(results, every[:_CUT]), _table(results, (0, *every[_CUT:]))]


def _table(results: Results, columns: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i in columns:
        table.add_column(
            HEADINGS[i],
            justify="left" if i < _WORDS else "right",
            vertical="bottom",
            no_wrap=True,
        )
    for result in results.strategies:
        style = "dim" if result.error else ("bold" if result.name == "symplectic" else None)
        cells = row(result)
        table.add_row(*(escape(cells[i]) for i in columns), style=style)
    return table


def table_console() -> Console:
    """Standard output, as wide as the table where that is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_REPORT_WIDTH)


def _pace(session: Session) -> str:
    history = session.history
    if not history.nll:
        return ""
    validation = f"  validation {history.validation[-1][1]:.2f}" if history.validation else ""
    return (
        f"NLL {history.nll[-1]:.2f}{validation}  {history.seconds[-1]:.2f} s  "
        f"{history.accepted[-1]} steps"
    )
