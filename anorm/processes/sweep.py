"""A sweep: every job a fresh process, its configuration frozen before the first one starts."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from anorm.config.frozen import Config
from anorm.processes.errors import user_errors
from anorm.processes.interrupt import end_with_parent

NOT_RUN = -1


def run_sweep(jobs: list[list[str]], script: Path, compose: Callable[[list[str]], Config]) -> int:
    """Run ``script --config FILE`` for each job, one after the other; 0 when all succeed, else 1.

    ``compose(overrides)`` gives a job's configuration. A job that cannot be composed, or fails, stops no other; a signal
    stops the one that runs, and those after it.
    """
    with tempfile.TemporaryDirectory(prefix="anorm-sweep-") as folder:
        files = []
        for number, overrides in enumerate(jobs):
            path = Path(folder) / f"{number}.yaml"
            with user_errors() as outcome:
                path.write_text(compose(overrides).text())
            if outcome.status:
                print(
                    f"  (job {number + 1} of {len(jobs)}: {' '.join(overrides)})", file=sys.stderr, flush=True
                )
            files.append((overrides, path, outcome.status))
        stopped, statuses = [], []
        for number, (overrides, path, status) in enumerate(files, 1):
            if not status and stopped:
                status = NOT_RUN
            elif not status:
                print(f"job {number} of {len(files)}: {' '.join(overrides)}", flush=True)
                status = _run([sys.executable, str(script), "--config", str(path)], stopped)
            statuses.append(status)
    print("sweep:")
    for (overrides, _, _), status in zip(files, statuses, strict=True):
        words = {0: "done", NOT_RUN: "not run"} | {128 + number: "stopped" for number in stopped}
        print(f"  {words.get(status, f'failed ({status})')}  {' '.join(overrides)}")
    return 128 + stopped[0] if stopped else int(any(statuses))


def _run(command: list[str], stopped: list[int]) -> int:
    """Run a command and return its status; signals to this process go to it, and are noted in ``stopped``."""
    # When the sweep is killed its job gets SIGTERM and saves; otherwise the repeated sweep finds the run folder locked.
    process = subprocess.Popen(command, preexec_fn=lambda: end_with_parent(signal.SIGTERM))

    def forward(number: int, frame: object) -> None:
        stopped.append(number)
        process.send_signal(number)

    before = {
        number: signal.signal(number, forward)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup
    }
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status
