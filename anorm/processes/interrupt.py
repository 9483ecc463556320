"""What ends a process: signals, and its parent's end."""

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """A signal stopped the run at a step boundary. saved: whether the checkpoint of that step was written; None in a
    process that writes none.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number: int = number
        self.saved: bool | None = None


@contextmanager
def interruptible() -> Iterator[None]:
    """Within: a signal that asks this process to end raises Interrupted at once, so that what is open is closed. While it
    trains, ``Agreement`` takes the signals over.
    """

    def stop(number: int, frame: object) -> None:
        raise Interrupted(number)

    before = {
        number: signal.signal(number, stop)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent(number: int) -> None:
    """Called in a child process: it is sent the signal ``number`` when its parent ends, however (on Linux)."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
