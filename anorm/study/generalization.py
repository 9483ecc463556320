"""Tables whose columns are domains, levels of corruption or backbones: a number is a mean over runs and evaluation sets.

A yaml of ``configs/table`` or ``configs/grid``, or any file:

    title: "Digits"
    overrides: [data=domains, ...]                     of every run
    runs:                                              each row is trained once for each of these
      MNIST: {overrides: ["data.train=[mnist]"], images: 60000}
    columns:                                           the mean over the runs and sets whose names fit
      - {name: SVHN, set: svhn}                        set, run: patterns such as *-5; default: all runs, all test sets
    mean: Avg.                                         a last column, the mean of the others
    rows:
      - {label: AFN, overrides: [norm=afn], both: true, printed: [...], readme: [...]}
    others: {both: [sn], own: [gn], with: [...]}       rows of other norms
    seeds: 3

``both``: the row has running statistics, and is shown under them and under those of the batch, so that transductive numbers
stand beside numbers of the same kind. printed, readme: in the order of the columns and the mean, null for none.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from anorm.study import markdown
from anorm.study.grid import Grid, Line, select
from anorm.study.printed import CONFIGS
from anorm.study.records import Run, find_runs
from anorm.study.sizes import Size, size_of
from anorm.study.statistics import Interval, mean_interval

KEYS = {"title", "runs", "columns", "rows"}
NOT_TESTED = ("val", "test", "selected_on_test")
"""Sets that no column takes unless it names them: of the training domains, or of all test domains together."""
V100_MACS = 800 * 4.089e9  # per second: 800 images/s of ResNet-50 with FP16 on a V100, for estimates only
MAIN_CORRUPTIONS = 15


@dataclass(frozen=True)
class Column:
    """A column: the runs and the evaluation sets whose names fit these patterns."""

    name: str
    set: str | None = None
    run: str = "*"

    def takes(self, run: str, images: str) -> bool:
        """Return whether a number of ``run`` on the set ``images`` belongs to this column."""
        if not fnmatchcase(run, self.run):
            return False
        return images not in NOT_TESTED if self.set is None else fnmatchcase(images, self.set)


@dataclass(frozen=True)
class Row:
    """A row. printed, readme: numbers by column, in percent."""

    label: str
    overrides: tuple[str, ...]
    both: bool = False
    printed: dict[str, float] = field(default_factory=dict)
    readme: dict[str, float] = field(default_factory=dict)

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("running", "batch") if self.both else ("running",)


@dataclass(frozen=True)
class Suite:
    """A table of this kind, before anything has been run of it."""

    name: str
    title: str
    overrides: tuple[str, ...]
    runs: dict[str, dict]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    mean: str | None = None
    clean: str | None = None
    corruptions: bool = False
    classes: int = 1000
    pixels: int = 224
    seeds: int = 3
    notes: tuple[str, ...] = ()

    def line(self, row: Row, run: str) -> Line:
        """Return the configuration of a row's run."""
        stats = ("eval.stats=[running,batch]",) if row.both else ()
        several = f", {run}" if len(self.runs) > 1 else ""
        overrides = (*self.overrides, *self.runs[run]["overrides"], *row.overrides, *stats)
        return self._lines.setdefault((row.label, run), Line(f"{row.label}{several}", self.title, overrides))

    @cached_property
    def _lines(self) -> dict[tuple[str, str], Line]:
        return {}

    def grid(self) -> Grid:
        """Return every run as a line, for ``cells``."""
        lines = tuple(self.line(row, run) for row in self.rows for run in self.runs)
        return Grid(self.name, self.title, lines, self.seeds, comparable=False, notes=self.notes)

    def size(self, row: Row, run: str) -> Size:
        return size_of(self.line(row, run).config, self.classes, self.pixels)

    def hours(self, row: Row, run: str) -> float:
        """Return a rough number of hours on a V100 with FP16, from multiply-adds: small networks take longer."""
        images, epochs = self.runs[run].get("images", 0), self.line(row, run).config.settings.epochs
        return images * epochs * self.size(row, run).macs / V100_MACS / 3600


def find(name: str) -> Path | None:
    """Return the file of a table of this kind; None where ``name`` is none."""
    for path in (CONFIGS / "table" / f"{name}.yaml", CONFIGS / "grid" / f"{name}.yaml", Path(name)):
        if path.is_file() and path.suffix == ".yaml":
            return path if is_suite(path) else None
    return None


def is_suite(path: Path) -> bool:
    """Return whether a yaml is a table of this kind."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    return isinstance(data, dict) and set(data) >= KEYS


def open_suite(path: Path, extra: tuple[str, ...] = ()) -> Suite:
    """Read a table. extra: arguments of train.py for every run. Raises ValueError, in words, for keys that it does not have."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {
        *KEYS,
        "overrides",
        "mean",
        "clean",
        "corruptions",
        "classes",
        "pixels",
        "others",
        "seeds",
        "notes",
    }
    known |= {"source", "section", "page"}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{path}: {unknown[0]} is none of {', '.join(sorted(known))}")
    columns = tuple(Column(**entry) for entry in data["columns"])
    heads = [column.name for column in columns] + ([data["mean"]] if data.get("mean") else [])
    rows = []
    for entry in data["rows"]:
        entry = dict(entry)
        for key in ("printed", "readme"):
            values = entry.pop(key, None)
            if values is None:
                continue
            if len(values) != len(heads):
                raise ValueError(
                    f"{path}: {entry['label']} has {len(values)} {key} numbers for {len(heads)} columns"
                )
            entry[key] = {head: value for head, value in zip(heads, values, strict=True) if value is not None}
        rows.append(Row(**entry | {"overrides": tuple(entry["overrides"])}))
    others = data.get("others") or {}
    for both in (True, False):
        for norm in others.get("both" if both else "own", ()):
            rows.append(Row(norm, (*others.get("with", ()), f"norm={norm}"), both))
    where = data.get("source", "")
    where += f", section {data['section']}" if data.get("section") else ""
    return Suite(
        path.stem,
        data["title"],
        (*data.get("overrides", ()), *extra),
        {name: {**entry, "overrides": tuple(entry["overrides"])} for name, entry in data["runs"].items()},
        columns,
        tuple(rows),
        data.get("mean"),
        data.get("clean"),
        data.get("corruptions", False),
        data.get("classes", 1000),
        data.get("pixels", 224),
        data.get("seeds", 3),
        ((f"printed in {where}",) if where else ()) + tuple(data.get("notes", ())),
    )


# ---- what the runs say


@dataclass(frozen=True)
class Measured:
    """A row under one kind of statistics. numbers: by seed, then (run, set) -> (top-1 in percent, images); only of seeds
    of which every run is finished. batches: how images came together, where that matters.
    """

    row: Row
    stats: str
    numbers: dict[int, dict[tuple[str, str], tuple[float, int]]]
    batches: str = ""
    finished: int = 0
    wanted: int = 0

    def over_seeds(self, value: Callable[[dict], float | None]) -> Interval | None:
        """Return the mean of a number over the seeds that have it."""
        values = [v for found in self.numbers.values() if (v := value(found)) is not None]
        return mean_interval(values) if values else None


def column_value(suite: Suite, column: Column, numbers: dict) -> float | None:
    """Return the mean over the runs and sets of a column; None where there is none."""
    values = [value for (run, images), (value, _) in numbers.items() if column.takes(run, images)]
    return float(np.mean(values)) if values else None


def average(suite: Suite, numbers: dict) -> float | None:
    """Return the mean over columns."""
    values = [column_value(suite, column, numbers) for column in suite.columns]
    return None if None in values or not values else float(np.mean(values))


def pooled(suite: Suite, numbers: dict) -> float | None:
    """Return the share of right answers among all images of all columns, in percent."""
    parts = [entry for key, entry in numbers.items() if any(c.takes(*key) for c in suite.columns)]
    return sum(value * n for value, n in parts) / sum(n for _, n in parts) if parts else None


def worst(suite: Suite, numbers: dict) -> float | None:
    """Return the lowest number of one run on one set."""
    values = [value for key, (value, _) in numbers.items() if any(c.takes(*key) for c in suite.columns)]
    return min(values, default=None)


def errors_by_corruption(numbers: dict) -> dict[str, float]:
    """Return the error of each of the 15 main corruptions, summed over its levels; empty where one is missing."""
    from anorm.data.corruptions import MAIN

    found: dict[str, float] = {}
    for (_, images), (value, _) in numbers.items():
        name = images.split("-")[1] if images.count("-") == 2 else ""
        if name in MAIN:
            found[name] = found.get(name, 0.0) + 100 - value
    return found if len(found) == MAIN_CORRUPTIONS else {}


def mean_corruption_error(numbers: dict, baseline: dict) -> float | None:
    """Return the mean over corruptions of the error relative to the baseline's, in percent (Hendrycks and Dietterich, 2019,
    where the baseline is AlexNet).
    """
    mine, theirs = errors_by_corruption(numbers), errors_by_corruption(baseline)
    if not mine or not theirs or min(theirs.values()) <= 0:
        return None
    return 100 * float(np.mean([mine[name] / theirs[name] for name in mine]))


def measure(suite: Suite, runs: Iterable[Run], seeds: int, epoch: str = "last") -> list[Measured]:
    """Fill every row under each of its statistics from finished runs."""
    finished = [run for run in runs if run.final]
    found = []
    for row in suite.rows:
        by_seed: dict[int, dict[str, Run]] = {}
        for name in suite.runs:
            wanted = suite.line(row, name).likeness
            for run in finished:
                if run.likeness == wanted and run.seed < seeds:
                    by_seed.setdefault(run.seed, {})[name] = run
        for stats in row.statistics:
            numbers, words = {}, set()
            for seed, of_seed in sorted(by_seed.items()):
                if len(of_seed) < len(suite.runs):
                    continue
                numbers[seed] = {}
                for name, run in of_seed.items():
                    for event in events_of(run, stats, epoch):
                        numbers[seed][name, event["set"]] = (event["top1"], event["images"])
                        words.add(event.get("batches", ""))
            count = sum(map(len, by_seed.values()))
            batches = "; ".join(sorted(words - {""}))
            found.append(Measured(row, stats, numbers, batches, count, seeds * len(suite.runs)))
    return found


def events_of(run: Run, stats: str, epoch: str) -> list[dict]:
    """Return the evaluations of an epoch under some statistics, one a set."""
    wanted = run.final["best_epoch"] if epoch == "best" else run.config.settings.epochs
    events = [e for e in run.events if e["event"] == "eval" and e["epoch"] == wanted]
    return [{"set": "val", **e} for e in events if e.get("stats", "running") == stats]


# ---- words


def shown(value: Interval | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.2f}" + (f" ± {value.half:.2f}" if math.isfinite(value.half) else "")


def table_of(suite: Suite, found: list[Measured]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows in words."""
    heads = [column.name for column in suite.columns] + ([suite.mean] if suite.mean else [])
    more = ["pooled", "worst"] if suite.mean else []
    more = ["clean", "mCE of BN's"] if suite.corruptions else more
    baseline, clean = found[0], Column("clean", suite.clean)
    rows = []
    for measured in found:
        row = measured.row
        first = measured.stats == row.statistics[0]
        if first:
            for name, values in (("printed", row.printed), ("printed in the README", row.readme)):
                if values:
                    cells = [f"{values[head]:g}" if head in values else "-" for head in heads]
                    rows.append([row.label, name, *cells, *("" for _ in more)])
        over = measured.over_seeds
        cells = [shown(over(lambda n, c=column: column_value(suite, c, n))) for column in suite.columns]
        cells += [shown(over(lambda n: average(suite, n)))] if suite.mean else []
        if suite.corruptions:
            cells.append(shown(over(lambda n: column_value(suite, clean, n))))
            relative = [
                v
                for seed, n in measured.numbers.items()
                if seed in baseline.numbers
                and (v := mean_corruption_error(n, baseline.numbers[seed])) is not None
            ]
            cells.append(shown(mean_interval(relative)) if relative else "-")
        elif more:
            cells += [shown(over(lambda n: pooled(suite, n))), shown(over(lambda n: worst(suite, n)))]
        state = (
            f"{measured.finished} of {measured.wanted} runs" if measured.finished < measured.wanted else ""
        )
        under = f"{measured.stats} statistics" + (f" ({measured.batches})" if measured.batches else "")
        rows.append([row.label, f"ours, {under}" + (f", {state}" if state else ""), *cells])
    return ["", "accuracy in percent", *heads, *more], rows


def comparisons(suite: Suite, found: list[Measured]) -> list[str]:
    """Return each row against the first under the same statistics, paired by seed, in words."""
    said, base = [], suite.rows[0].label
    by_key = {(m.row.label, m.stats): m for m in found}

    def value(numbers: dict) -> float | None:
        if suite.mean:
            return average(suite, numbers)
        values = [column_value(suite, column, numbers) for column in suite.columns]
        values = [v for v in values if v is not None]
        return float(np.mean(values)) if values else None

    for measured in found:
        against = by_key.get((base, measured.stats))
        if measured.row.label == base or against is None:
            continue
        both = sorted(set(measured.numbers) & set(against.numbers))
        pairs = [(value(measured.numbers[s]), value(against.numbers[s])) for s in both]
        gaps = [a - b for a, b in pairs if a is not None and b is not None]
        if not gaps:
            continue
        gap = mean_interval(gaps)
        sure = f"95 % interval {gap.low:+.2f} to {gap.high:+.2f}" if gap.n > 1 else "one seed, no interval"
        said.append(
            f"{measured.row.label} - {base}, both with {measured.stats} statistics: {gap.mean:+.2f} points of the mean "
            f"({sure}, {gap.n} seed{'s' if gap.n > 1 else ''}, paired)"
        )
    return said


def sizes(suite: Suite) -> list[str]:
    """Return the parameters and multiply-adds of each row's networks, in words."""
    said = []
    for row in suite.rows:
        parts = {}
        for run in suite.runs:
            size = suite.size(row, run)
            words = f"{size.all / 1e6:.3f} M parameters, {size.macs / 1e9:.3f} G multiply-adds"
            parts.setdefault(words, []).append(run)
        each = "; ".join(
            words + (f" ({', '.join(names)})" if len(parts) > 1 else "") for words, names in parts.items()
        )
        said.append(f"{row.label}: {each}")
    return said


def missing(suite: Suite, runs: Iterable[Run], seeds: int) -> list[tuple[Row, str, int]]:
    """Return the runs that are not finished: row, run, seed; one seed of all before the next."""
    done = {(run.likeness, run.seed) for run in runs if run.final}
    return [
        (row, name, seed)
        for seed in range(seeds)
        for row in suite.rows
        for name in suite.runs
        if (suite.line(row, name).likeness, seed) not in done
    ]


def plan(suite: Suite, left: list[tuple[Row, str, int]]) -> str:
    """Return the missing runs with hours and commands."""
    lines, total = [], 0.0
    for row, name, seed in left:
        one = suite.hours(row, name)
        total += one
        line = suite.line(row, name)
        lines.append(f"{line.label}, seed {seed}: {one:.2f} h\n  {line.command(seed)}")
    lines.append(
        f"{len(left)} runs, {total:,.1f} hours (rough: multiply-adds at the pace of a V100 with FP16)"
    )
    return "\n".join(lines) + "\n"


def words(suite: Suite, found: list[Measured], left: list[tuple[Row, str, int]], form: str) -> str:
    """Return the whole table as terminal, markdown, latex or csv."""
    heads, rows = table_of(suite, found)
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([heads, *rows])
        return out.getvalue()
    if form == "latex":
        from anorm.study.formats import tex

        body = [" & ".join(map(tex, row)) + r" \\" for row in rows]
        start = [
            r"\begin{tabular}{ll" + "r" * (len(heads) - 2) + "}",
            " & ".join(map(tex, heads)) + r" \\ \hline",
        ]
        return "\n".join([*start, *body, r"\end{tabular}", *(f"% {note}" for note in suite.notes)]) + "\n"
    compared = comparisons(suite, found)
    commands = [suite.line(row, name).command(seed) for row, name, seed in left]
    if form == "markdown":
        lines = [f"## {suite.title}", "", *markdown.table(heads, rows, words=2), ""]
        lines += [*(f"* {line}" for line in compared), ""] if compared else []
        lines += [*(f"* {line}" for line in sizes(suite)), "", *(f"* {note}" for note in suite.notes)]
        lines += (
            ["", f"Missing ({len(commands)} runs):", "", *(f"    {c}" for c in commands)] if commands else []
        )
        return "\n".join(lines) + "\n"
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def aligned(cells: list[str]) -> str:
        return "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    lines = [f"{suite.name}: {suite.title}", "", *(aligned(row) for row in [heads, *rows])]
    lines += ["", "Compared:", *(f"  {line}" for line in compared)] if compared else []
    lines += ["", "Sizes:", *(f"  {line}" for line in sizes(suite))]
    lines += ["", "Notes:", *(f"  {note}" for note in suite.notes)]
    lines += (
        ["", f"Missing ({len(commands)} runs; --run runs them):", *(f"  {c}" for c in commands)]
        if commands
        else []
    )
    return "\n".join(lines) + "\n"


def chosen(suite: Suite, only: str) -> Suite:
    """Return the suite with the rows that ``select`` keeps, for all of its runs. Raises ValueError for none."""
    from dataclasses import replace

    kept = {line.overrides for line in select(suite.grid(), only).lines}
    rows = tuple(r for r in suite.rows if any(suite.line(r, run).overrides in kept for run in suite.runs))
    return replace(suite, rows=rows)


def show(suite: Suite, asked: argparse.Namespace, run_missing: Callable[[Grid, int], int]) -> int:
    """Run what is missing where that is asked for, and print the table; the exit status. asked: of tools/table.py."""
    for option, value in (("--weights", asked.weights), ("--average", asked.average), ("--html", asked.html)):
        if value:
            raise ValueError(f"{option} is not for {suite.name}, whose numbers are means over runs and sets")
    suite = chosen(suite, asked.only) if asked.only else suite
    seeds = suite.seeds if asked.seeds is None else asked.seeds
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} must be at least 1")
    status = run_missing(suite.grid(), seeds) if asked.run and not asked.dry else 0
    runs = find_runs(asked.runs)
    left = missing(suite, runs, seeds)
    if asked.dry:
        print(plan(suite, left), end="")
    else:
        print(words(suite, measure(suite, runs, seeds, asked.epoch), left, asked.format), end="")
    return status
