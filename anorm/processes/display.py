"""Output that a run outlives: a pipe whose reader left, a closed terminal, a full disk behind a log."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

__all__ = ["lasting_output", "lost_output"]

LOST = "ANORM_OUTPUT_LOST"
"""Set in the environment for processes that this one starts: what they inherit in place of the output takes anything."""


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within: a line that standard output or error cannot take is dropped, with all after it, and raises nothing.

    ``print`` would raise BrokenPipeError or OSError and end the run with it. ``lost_output`` tells what happened.
    """
    if isinstance(sys.stdout, _Lasting):
        yield
        return
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Lasting(stream) if stream else stream for stream in before)
    if LOST in os.environ and before[0]:
        sys.stdout.lost = os.environ[LOST]
    try:
        yield
    finally:
        if getattr(sys.stdout, "told", False):
            del os.environ[LOST]
        sys.stdout, sys.stderr = before


def lost_output() -> str | None:
    """Return why standard output is lost, None while it is not."""
    stream = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # rich puts its own in front
    return str(stream.lost) if isinstance(stream, _Lasting) and stream.lost else None


class _Lasting:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: TextIO):
        self._stream, self.lost, self.told = stream, None, False

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self._attempt(self._stream.writelines, lines)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        return not self.lost and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, work: Any, *arguments: Any) -> None:
        if self.lost:
            return
        try:
            work(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.lost = error
            if getattr(sys.stdout, "rich_proxied_file", sys.stdout) is self:
                os.environ[LOST], self.told = str(error), True
            # What is still in the buffer would raise once more when the interpreter ends, and change its exit status.
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
