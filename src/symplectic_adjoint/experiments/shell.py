"""What every command does around its work: signals, errors in words, exit codes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer
from rich.console import Console

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint._extras import MissingExtraError
from symplectic_adjoint.experiments.compare import RunInterruptedError

_USAGE = 2


class StopSignal:
    """Turns the first Ctrl-C, or a request to terminate, into a flag that the run asks for.

    A second one interrupts at once, which loses what was done since the last checkpoint.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + (self.received or signal.SIGINT)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        # Straight to the descriptor: a handler may interrupt a write to the stream itself.
        os.write(2, b"\nStopping after this step; once more to stop at once.\n")


@contextmanager
def guarded(messages: Console, again: str) -> Iterator[StopSignal]:
    """Turns errors and signals into a message and an exit code, for the time of a with block.

    Args:
        messages: Where the messages go.
        again: The command that continues a stopped run.

    Yields:
        Whether a signal came, to be asked between units of work.

    Raises:
        Exit: With the code of what happened.
    """
    stop = StopSignal()
    try:
        with stop:
            yield stop
    except (ArgumentError, MissingExtraError, OSError) as error:
        _print(messages, f"error: {error}", style="red")
        raise typer.Exit(_USAGE if isinstance(error, ArgumentError) else 1) from error
    except (RunInterruptedError, KeyboardInterrupt) as error:
        _print(messages, f"Stopped. Continue with: {again}")
        raise typer.Exit(stop.exit_code) from error


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
