"""A paper's table, or any grid, as it stands: printed, ours, judged; and the runs that are missing.

    python tools/table.py table2                              the table; the command of every missing cell at its end
    python tools/table.py table2 --run data.root=/imagenet    run what is missing; repeat it to continue
    python tools/table.py table2 --run --submit slurm slurm.partition=gpu    each cell a job of a Slurm cluster
    python tools/table.py table2 --dry                        which cells, how many device-hours
    python tools/table.py table3 --only resnet50-an --seeds 5
    python tools/table.py table2 --scale proxy --run          a smaller protocol (configs/scale)
    python tools/table.py digits --run                        a grid of configs/grid, or a yaml file with axes
    python tools/table.py table2 --weights DIR data.root=/imagenet   published checkpoints in place of runs
    python tools/table.py tiny --metric ece,mean_class_accuracy   other columns; the first decides verdicts and comparisons
    python tools/table.py table2 --format markdown            or latex, csv
    python tools/table.py table2 --html table2.html           a page: table with sort and filter, curves, comparisons

Tables: table1, table2, table3, v1_table1, afn_table1 to afn_table6 (configs/table). Further arguments are train.py's, for
every cell. The numbers of afn_table... are means over domains or corruptions; each stands under running and under batch
statistics. Several such commands may run at once on one folder of runs: no cell is run twice. On one machine give each its own GPUs
(CUDA_VISIBLE_DEVICES=0,1,2,3 python tools/table.py ...), as a run takes all that it sees. A run that failed stays in the
table's end with its last error, and is run again with --retry.

--weights: each file under DIR fills the row whose network takes all of its tensors, whatever the file is
called; rows that differ in the setup alone (AOGNet) are told apart by the word vanilla or sota in its name or
its folder's. Their numbers have a protocol of their own, "published weights", and share no column with those of runs.

--metric: names of the task's metrics, NAME, or NAME@SET/STATISTICS for one of several evaluation sets or statistics
(top1@photo/batch, top1@/recalibrated). An unknown name is answered with those that there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anorm.study.grid import Grid
    from anorm.study.published import Match
    from anorm.study.tally import Tally


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("table", help="table2, a grid of configs/grid, or a yaml file")
    add("arguments", nargs="*", metavar="key=value", help="arguments of train.py for every cell")
    add("--run", action="store_true", help="run what is missing")
    add(
        "--submit",
        choices=("slurm",),
        help="with --run: as jobs of a cluster; slurm.OPTION=VALUE as train.py takes them",
    )
    add("--retry", action="store_true", help="with --run: also what failed")
    add("--dry", action="store_true", help="say what --run would run, and what it costs")
    add("--seeds", type=int, metavar="N", help="seeds 0 to N-1 of each row (default 3, or the grid's)")
    add(
        "--only",
        metavar="WORDS",
        help="rows whose label, group or arguments hold one of the comma-separated words",
    )
    add("--faithful", default="paper", choices=("paper", "code"), help="networks and recipe where paper and code differ")
    add("--scale", metavar="NAME", help="a smaller protocol of configs/scale, such as proxy")
    add("--weights", type=Path, metavar="DIR", help="show the accuracy of the published files in DIR")
    add("--metric", metavar="A,B", help="the columns (default: the table's, or those that the task shows)")
    add("--average", action="store_true", help="numbers of the averages of weights (runs with ema.decay)")
    add("--epoch", default="last", choices=("last", "best"), help="whose numbers are shown")
    add("--stamp", type=int, metavar="K", help="show the K-th evaluation protocol (default: the one with most runs)")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where the runs are (default: runs)")
    add("--format", default="terminal", choices=("terminal", "markdown", "latex", "csv"))
    add("--html", type=Path, metavar="FILE", help="also write a page that opens from disk")
    return found


def main(argv: list[str]) -> int:
    """Return 0, 1 when a cell failed, 2 for what the user can mend, 128 + n after signal n."""
    asked = parser().parse_intermixed_args(argv)

    from anorm.processes.errors import user_errors

    with user_errors() as outcome:
        return run(asked)
    return outcome.status


def run(asked: argparse.Namespace) -> int:
    """Fill and print the table; the exit status."""
    from anorm.processes.slurm import submit, wishes_from
    from anorm.study import generalization
    from anorm.study.cells import Cell, cells_of, run_cells
    from anorm.study.formats import FORMATS
    from anorm.study.grid import open_grid, select
    from anorm.study.printed import ROOT
    from anorm.study.published import evaluate, match
    from anorm.study.records import find_runs
    from anorm.study.tally import columns_of, tally

    of_slurm = [word for word in asked.arguments if word.startswith("slurm.")]
    if of_slurm and not asked.submit:
        raise ValueError(f"{of_slurm[0]} is for jobs of a Slurm cluster: add --submit slurm")
    wishes = wishes_from(of_slurm)
    extra = tuple(word for word in asked.arguments if word not in of_slurm)

    def run_missing(grid: Grid, seeds: int) -> int:
        """Run the cells of ``grid`` that are not finished, say what became of them; the exit status."""
        machine = wishes.machine if asked.submit else None

        def queue(cell: Cell) -> str:
            return submit(ROOT / "train.py", cell.config(machine), asked.runs, wishes)

        cells = cells_of(grid, seeds, asked.runs, machine)
        done = run_cells(cells, asked.runs, asked.retry, queue if asked.submit else None)
        print(
            f"cells: {done.finished} finished, {done.failed} failed, {done.elsewhere} with other workers"
            + (f", {done.submitted} submitted" if asked.submit else "")
            + "\n",
            flush=True,
        )
        return done.status

    if path := generalization.find(asked.table):
        return generalization.show(generalization.open_suite(path, extra), asked, run_missing)
    grid = open_grid(asked.table, asked.faithful, asked.scale, extra)
    grid = select(grid, asked.only) if asked.only else grid
    seeds = (1 if asked.weights else grid.seeds) if asked.seeds is None else asked.seeds
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} must be at least 1")
    if asked.weights and (asked.run or asked.average):
        raise ValueError("--weights evaluates what others trained: leave out --run and --average")
    columns = columns_of(grid, asked.metric.split(",") if asked.metric else (), asked.epoch, asked.average)
    status, published = 0, []
    if asked.weights:
        matches = match(grid, asked.weights)
        if asked.dry:
            print("\n".join(map(str, matches)))
            return 0
        published = evaluate(matches, asked.runs, [column.reading for column in columns])
        grid = with_misfits(grid, matches, asked.faithful)
    if asked.run and not asked.dry:
        status = run_missing(grid, seeds)
    runs = [*find_runs(asked.runs), *published]
    found = tally(grid, runs, seeds, asked.faithful, columns, asked.stamp)
    found = with_failures(found, asked.runs)
    print(plan(found) if asked.dry else FORMATS[asked.format](found), end="")
    if asked.html:
        from anorm.study.page import html

        asked.html.write_text(html(found), encoding="utf-8")
    return status


def plan(found: Tally) -> str:
    """Return the cells that --run would run, with hours and commands."""
    from anorm.study.tally import hours, total_hours

    lines = []
    for entry in found.entries:
        one, origin = hours(entry, list(found.entries))
        cost = (
            f"{one:.1f} h ({origin})"
            if one is not None
            else "cost unknown (train.py ... dry=true measures it)"
        )
        lines += [
            f"{entry.line.label}, seed {seed}: {cost}\n  {entry.line.command(seed)}" for seed in entry.missing
        ]
    total, unknown, origins = total_hours(found)
    cells = sum(len(entry.missing) for entry in found.entries)
    lines.append(
        f"{cells} cells, {total:,.0f} device-hours (hours times devices; {origins or 'nothing to estimate'})"
        + (f", and {unknown} cells of unknown cost" if unknown else "")
    )
    return "\n".join(lines) + "\n"


def with_misfits(grid: Grid, matches: list[Match], faithful: str) -> Grid:
    """Return ``grid`` with a note for each file that fills no row."""
    other = "code" if faithful == "paper" else "paper"
    said = [
        f"{found} after the {faithful}; --faithful {other} has other networks"
        for found in matches
        if found.line is None
    ]
    return dataclasses.replace(grid, notes=(*said, *grid.notes))


def with_failures(found: Tally, runs_dir: Path) -> Tally:
    """Return ``found`` with a note for each run of it that was cut, or failed."""
    from anorm.study.cells import Book

    said = []
    failed = Book(runs_dir).failures() if (runs_dir / ".grid").is_dir() else []
    for entry in found.entries:
        commands = {entry.line.command(seed): seed for seed in entry.missing}
        said += [
            f"failed: {entry.line.label}, seed {commands[f['command']]}: {f['error']} ({f['log']}; --retry)"
            for f in failed
            if f["command"] in commands
        ]
        said += [
            f"cut off: {entry.line.label}, seed {run.seed}: {run.folder}"
            for run in entry.unfinished
            if run.seed in entry.missing
        ]
    grid: Grid = dataclasses.replace(found.grid, notes=(*said, *found.grid.notes))
    return dataclasses.replace(found, grid=grid)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
