"""Running the missing cells of a grid: each by train.py in a process of its own, each once, whatever happens to the others.

A cell is a run's signature. Beside the run folders lies ``.grid``: SIGNATURE.lock, which the worker and its train.py hold
while they run (the system releases it with the last of them), SIGNATURE.yaml, its configuration, SIGNATURE.log, what the
run printed, and SIGNATURE.failed, what is known of its last failure. A cell that failed is left alone until it is
retried. On a cluster a cell is submitted instead: SIGNATURE.job holds the job's number, and while Slurm has that job the
cell is taken.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from anorm.build import create_source
from anorm.config.frozen import Config
from anorm.config.machine import Machine
from anorm.processes import slurm
from anorm.study.grid import Grid, Line
from anorm.study.printed import ROOT
from anorm.study.records import find_runs


@dataclass(frozen=True)
class Cell:
    """One run to be made; ``labels``: the rows that it fills."""

    signature: str
    line: Line
    seed: int
    folder: Path
    labels: tuple[str, ...]

    def config(self, machine: Machine | None = None) -> Config:
        """Return the configuration for train.py --config, on a machine elsewhere or on this one."""
        config = self.line.config.having(seed=self.seed, run_dir=str(self.folder))
        return config.meant_for(machine) if machine else config


def cells_of(grid: Grid, seeds: int, runs_dir: Path, machine: Machine | None = None) -> list[Cell]:
    """Every cell, seed by seed, so that the whole table has one seed before any row has two. machine: what they will run
    on, where that is not this one.

    Raises ValueError where the data are not at hand.
    """
    found: dict[str, Cell] = {}
    identities: dict[str, str] = {}
    for seed in range(seeds):
        for line in grid.lines:
            config = line.config.having(seed=seed).on(machine)
            data = json.dumps(config.data.tree())
            identities[data] = identities.get(data) or create_source(config).identity
            signed = config.signed(identities[data])
            labels = (*(found[signed].labels if signed in found else ()), line.label)
            folder = runs_dir.resolve() / line.folder(seed, signed).name
            found[signed] = Cell(signed, line, seed, folder, labels)
    return list(found.values())


class Book:
    """What is known of cells: finished, failed, taken."""

    def __init__(self, runs_dir: Path):
        self.runs_dir, self.folder = runs_dir, runs_dir / ".grid"
        self.folder.mkdir(parents=True, exist_ok=True)

    def finished(self) -> set[str]:
        return {run.signature for run in find_runs(self.runs_dir) if run.final}

    def failure(self, signed: str) -> dict | None:
        path = self.folder / f"{signed}.failed"
        return json.loads(path.read_text()) if path.is_file() else None

    def failures(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.failed"))]

    def log(self, signed: str) -> Path:
        return self.folder / f"{signed}.log"

    def fail(
        self, cell: Cell, status: int | None = None, seconds: float | None = None, log: Path | None = None
    ) -> None:
        log = log or self.log(cell.signature)
        known = {
            "labels": cell.labels,
            "seed": cell.seed,
            "status": status,
            "error": last_words(log),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "seconds": seconds and round(seconds),
            "log": str(log),
            "command": cell.line.command(cell.seed),
        }
        self._write(f"{cell.signature}.failed", json.dumps(known, indent=1))

    def forgive(self, signed: str) -> None:
        (self.folder / f"{signed}.failed").unlink(missing_ok=True)

    def job(self, signed: str) -> str | None:
        """The number of the Slurm job that the cell was last submitted as."""
        path = self.folder / f"{signed}.job"
        return path.read_text() if path.is_file() else None

    def submitted(self, signed: str, job: str) -> None:
        self._write(f"{signed}.job", job)

    def forget_job(self, signed: str) -> None:
        (self.folder / f"{signed}.job").unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        new = self.folder / f"{name}.new"
        new.write_text(text)
        new.replace(self.folder / name)

    @contextmanager
    def taken(self, signed: str) -> Iterator[int | None]:
        """Hold the cell; gives the lock's file descriptor, or None where another worker, or a train.py of it, holds it."""
        with open(self.folder / f"{signed}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield lock.fileno()


def last_words(log: Path) -> str:
    """The error that a run ended with: its last "error:" line, else its last line."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it printed nothing"])[-1][:500]


@dataclass
class Outcome:
    """What became of every cell, and the signal that stopped the work, or 0."""

    finished: int = 0
    failed: int = 0
    elsewhere: int = 0
    submitted: int = 0
    stopped: int = 0

    @property
    def status(self) -> int:
        return 128 + self.stopped if self.stopped else int(self.failed > 0)


def run_cells(
    cells: list[Cell], runs_dir: Path, retry: bool = False, submit: Callable[[Cell], str] | None = None
) -> Outcome:
    """Run what is neither finished, taken nor (without ``retry``) failed; says what it does. submit: instead of running a
    cell, makes a Slurm job of it and gives the job's number.
    """
    book, outcome = Book(runs_dir), Outcome()
    for number, cell in enumerate(cells, 1):
        name = f"cell {number} of {len(cells)}, {' = '.join(cell.labels)}, seed {cell.seed}"
        with book.taken(cell.signature) as lock:
            job = None if lock is None else book.job(cell.signature)
            waits = job is not None and slurm.active(job)
            if job and not waits:
                book.forget_job(cell.signature)
                if cell.signature not in book.finished():
                    book.fail(cell, log=slurm.log_of(runs_dir, job))
            known = book.failure(cell.signature)
            if lock is None or waits:
                outcome.elsewhere += 1
                print(f"{name}: {f'job {job}' if waits else 'another worker'} has it", flush=True)
            elif cell.signature in book.finished():
                outcome.finished += 1
                book.forgive(cell.signature)
            elif known and not retry:
                outcome.failed += 1
                print(
                    f"{name}: failed on {known['time']}: {known['error']} (--retry; {known['log']})",
                    flush=True,
                )
            else:
                print(f"{name}: {cell.line.command(cell.seed)}", flush=True)
                if submit:
                    book.forgive(cell.signature)
                    book.submitted(cell.signature, job := submit(cell))
                    outcome.submitted += 1
                    print(f"  job {job}: {slurm.log_of(runs_dir, job)}", flush=True)
                    continue
                _run(cell, book, lock, outcome)
                if outcome.stopped:
                    break
    return outcome


def _run(cell: Cell, book: Book, lock: int, outcome: Outcome) -> None:
    file = book.folder / f"{cell.signature}.yaml"
    file.write_text(cell.config().text())  # files of configs/ may have been edited since the table was opened
    command, started = [sys.executable, str(ROOT / "train.py"), "--config", str(file)], time.monotonic()
    with open(book.log(cell.signature), "w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=(lock,),
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )

        def stop(number: int, frame: object) -> None:
            outcome.stopped = number
            process.send_signal(number)  # train.py saves and ends

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    seconds = time.monotonic() - started
    if status == 0:
        outcome.finished += 1
        book.forgive(cell.signature)
        print(f"  finished in {seconds:.0f} s: {last_words(book.log(cell.signature))}", flush=True)
    elif outcome.stopped:
        print("  stopped; repeat the command to continue", flush=True)
    else:
        outcome.failed += 1
        book.fail(cell, status, seconds)
        print(
            f"  failed ({status}): {last_words(book.log(cell.signature))} ({book.log(cell.signature)})",
            flush=True,
        )
