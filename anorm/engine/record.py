"""What a run leaves behind: metrics.jsonl (written and read here only), TensorBoard, and what a person sees meanwhile.

Every line of metrics.jsonl is an object with "event": start, train (every log.every steps), eval, checkpoint, warning
(output was lost, once) and, last and once, final.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from anorm.processes.display import lost_output

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, up to one that was cut off by a kill or spoiled by a loss of power: what follows it is not
    of the state that the run continues from.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last line end is incomplete
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def final_metrics(folder: Path) -> dict[str, Any] | None:
    """Return the final event of a finished run, None while it is not finished."""
    lines = read_metrics(folder)
    return lines[-1] if lines and lines[-1]["event"] == "final" else None


class Record:
    """Appends events to metrics.jsonl and TensorBoard and shows them; a silent stand-in on ranks other than 0.

    offset: bytes of metrics.jsonl that belong to the state that the run continues from; the rest (steps that
    will be done again) is cut off, so that the log has neither gaps nor doubles.
    """

    def __init__(
        self,
        folder: Path,
        active: bool = True,
        tensorboard: bool = True,
        offset: int = 0,
        step: int = 0,
        total_steps: int = 1,
    ):
        self.active, self._file, self._board, self._bar = active, None, None, None
        self._told = False  # that output is lost
        if not active:
            return
        path = folder / METRICS
        self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # held until close()
        # what somebody shortened meanwhile is not filled up
        self._file.truncate(min(offset, os.fstat(self._file.fileno()).st_size))
        self._file.seek(0, os.SEEK_END)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # what came after the checkpoint's step is hidden; the points of that step are not written again
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if sys.stdout.isatty():
            self._bar = _Bar(step, total_steps)

    @property
    def offset(self) -> int:
        """Return the number of bytes written so far."""
        return self._file.tell() if self.active else 0

    def write(self, event: str, board: str | None = None, **fields: Any) -> None:
        """Append an event. board: the name of its curves in TensorBoard (default: the event's)."""
        if not self.active:
            return
        if not self._told and self.offset and (reason := lost_output()):
            self._told = True
            self._append(_line("warning", message=f"standard output is lost ({reason}); the run goes on without it"))
        self._append(content := _line(event, **fields))
        line = json.loads(content)
        if event in ("checkpoint", "eval", "final"):
            os.fsync(self._file.fileno())
        if self._board and event in ("train", "eval"):
            for key, value in line.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{board or event}/{key}", value, line["step"])
            self._board.flush()

    def _append(self, line: bytes) -> None:
        """Write a line whole or not at all, also on a full disk."""
        start = self.offset
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        except OSError:
            self._file.truncate(start)
            self._file.seek(start)
            raise

    def say(self, text: str) -> None:
        """Print a line for the person who watches."""
        if not self.active:
            return
        if self._bar:
            self._bar.say(text)
        else:
            print(text, flush=True)

    def progress(self, step: int, text: str) -> None:
        """Show where the run is: a bar on a terminal, else a plain line."""
        if not self.active:
            return
        if self._bar:
            self._bar.update(step, text)
        else:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        """Move the bar of a terminal; print nothing."""
        if self._bar:
            self._bar.update(step)

    def close(self) -> None:
        if self._bar:
            self._bar.close()
        if self._board:
            self._board.close()
        if self._file:
            self._file.close()


class _Bar:
    """rich's progress display."""

    def __init__(self, step: int, total: int):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        # 80 columns hold the words and the time; the bar takes what is left
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TimeRemainingColumn(),
            expand=True,
        )
        self._task = self._progress.add_task("", total=total, completed=step)
        self._progress.start()

    def update(self, step: int, text: str | None = None) -> None:
        self._progress.update(self._task, completed=step, **({"description": text} if text else {}))

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _line(event: str, **fields: Any) -> bytes:
    return (json.dumps({"event": event, **{key: _plain(value) for key, value in fields.items()}}) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)  # JSON has no NaN
    return value


def environment() -> dict[str, Any]:
    """Return what the numbers of a run may depend on besides its configuration: versions, machine, state of the code."""
    import torch

    git = {
        name: _git(*command)
        for name, command in (
            ("commit", ("rev-parse", "HEAD")),
            ("changed_files", ("status", "--porcelain", "--untracked-files=no")),
        )
    }
    devices = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": devices,
        "machine": platform.platform(),
        "processor": _processor(),
        "processor_threads": torch.get_num_threads(),
        "git": git,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _processor() -> str | None:
    """Return what Linux calls the processor, None where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _git(*command: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *command], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here: the run is as good without
    return found.stdout.strip() if found.returncode == 0 else None
