"""What the runs say about a grid: for each line the true size, ours over seeds, the gap to the paper, a verdict; comparisons."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from anorm.study.grid import Grid, Line
from anorm.study.published import PUBLISHED, Published
from anorm.study.records import Reading, Run, Stamp, agreed, images_of, task_of
from anorm.study.sizes import Size, size_of
from anorm.study.statistics import (
    USUAL_SD,
    Interval,
    Methods,
    compare_methods,
    holm,
    mean_interval,
    noise_of_gap,
    small_of,
)
from anorm.tasks import Metric

REPRODUCED_SEEDS = 3
REPRODUCED_NOISE = 0.5  # points: above, an agreement proves too little
LEARNED = 30  # percent of accuracy that a baseline must reach before differences from it mean something
AS_PRINTED = 0.1  # points: what another decoder and another resize change in the accuracy of the same weights
V100_MACS = 800 * 4.089e9  # per second: 800 images/s of ResNet-50 with FP16 on a V100, for estimates only


@dataclass(frozen=True)
class Column:
    """A metric as the table shows it."""

    reading: Reading
    metric: Metric

    @property
    def name(self) -> str:
        """As --metric takes it, and as CSV and the papers' tables name it."""
        return str(self.reading)

    @property
    def heading(self) -> str:
        return self.reading.heading(self.metric)

    def printed(self, line: Line) -> float | None:
        """Return the paper's number for a line, in the metric's own direction: of an error the accuracy."""
        value = line.printed.values.get(self.name) if line.printed else None
        return 100 - value if value is not None and self.metric.as_error else value


@dataclass(frozen=True)
class Entry:
    """A line as it stands. runs: finished ones of the shown stamp, by seed, or published weights in place of seed 0.
    values: by the name of each of the table's columns, over seeds; None where no run has one. The first column decides:
    ``value`` is its interval, and gap and verdict are on it.
    """

    line: Line
    size: Size
    runs: dict[int, Run | Published]
    missing: tuple[int, ...]
    values: dict[str, Interval | None]
    gap: float | None  # ours - the paper's, in the metric's own direction
    verdict: str
    unfinished: tuple[Run, ...] = ()
    elsewhere: int = 0  # finished runs under another stamp, or without the metric

    @property
    def value(self) -> Interval | None:
        return next(iter(self.values.values()))

    @property
    def trained(self) -> list[Run]:
        """Own runs of the shown stamp."""
        return [run for run in self.runs.values() if isinstance(run, Run)]

    @property
    def images_per_second(self) -> float | None:
        return float(np.mean([run.images_per_second for run in self.trained])) if self.trained else None

    @property
    def machines(self) -> str:
        """What the runs ran on, each named once."""
        return "; ".join(dict.fromkeys(run.machine for run in self.trained))

    @property
    def gpu_hours(self) -> float | None:
        return sum(run.device_hours for run in self.trained) if self.trained and self.on_gpu else None

    @property
    def on_gpu(self) -> bool:
        return all(run.on_gpu for run in self.trained)


@dataclass(frozen=True)
class Comparison:
    """A line against its baseline. p: after Holm's correction over all comparisons of the table."""

    base: Entry
    entry: Entry
    found: Methods
    p: float | None


@dataclass(frozen=True)
class Selection:
    """The learning rates of one norm. best: of the best mean; None while one is missing."""

    name: str
    tried: tuple[Entry, ...]
    best: Entry | None
    metric: Metric

    def __str__(self) -> str:
        n = len(self.tried)
        if self.best is None:
            done = sum(not e.missing for e in self.tried)
            return f"learning rate of {self.name}: not selected, {done} of {n} are finished"
        digits, of = self.metric.digits, "accuracy" if self.metric.as_error else self.metric.heading
        values = ", ".join(f"{e.line.rate}: {e.value.mean:.{digits}f}" for e in self.tried)
        end = n > 1 and self.best.line.rate in (f([e.line.rate for e in self.tried]) for f in (min, max))
        return (
            f"learning rate of {self.name}: {self.best.line.rate} is the best of {n} tried, by the mean "
            f"{of} over seeds ({values})" + (", at the end of their range" if end else "")
        )


@dataclass(frozen=True)
class Tally:
    grid: Grid
    entries: tuple[Entry, ...]
    stamp: Stamp | None  # what all shown numbers were taken under
    stamps: dict[Stamp, int]  # every one, with the number of finished runs
    comparisons: tuple[Comparison, ...]
    faithful: str
    columns: tuple[Column, ...]
    seeds: int
    selections: tuple[Selection, ...] = ()

    @property
    def main(self) -> Column:
        """The column that gaps, verdicts, comparisons and selections are of."""
        return self.columns[0]

    @property
    def epoch(self) -> str:
        return self.main.reading.epoch

    @property
    def title(self) -> str:
        first = f"underpowered, {self.underpowered}: " if self.underpowered else ""
        return f"{first}{self.grid.name}: {self.grid.title}"

    @property
    def underpowered(self) -> str | None:
        """Why a finished grid of one's own tells no norms apart, if that is so; a reader must know it first."""
        if not self.comparisons or any(e.missing or e.line.printed for e in self.entries):
            return None
        if self.main.metric.as_error:
            for label, mean in {c.base.line.label: c.base.value.mean for c in self.comparisons}.items():
                if mean < LEARNED:
                    return f"{label} reaches {mean:.2f} % {self.main.metric.heading}, less than {LEARNED} %"
        differences = [c.found.difference for c in self.comparisons if c.found.difference.n > 1]
        if all(d.low <= 0 <= d.high for d in differences):
            return "the intervals cover every difference" if differences else "one run of each norm"
        return None

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers must know."""
        published = bool(self.stamp and self.stamp.weights == PUBLISHED)
        what = "accuracy" if self.main.metric.as_error else self.main.reading.heading(self.main.metric)
        said = [f"{what} of published weights (--weights)" if published else f"{what} of the {self.epoch} epoch (--epoch)"]
        said += [f"protocol of ours: {self.stamp}"] if self.stamp else ["nothing has been run yet"]
        said += [
            f"not shown, another protocol: {n} run{'s' if n > 1 else ''} of {stamp} (--stamp)"
            for stamp, n in self.stamps.items()
            if stamp != self.stamp
        ]
        if self.selections:
            said += [str(selection) for selection in self.selections]
            of = "accuracies are" if self.main.metric.as_error else f"{self.main.metric.heading} is"
            said += [f"each learning rate was selected on the images that {of} of: it flatters all"]
        return said + list(self.grid.notes)


def tally(
    grid: Grid,
    runs: list[Run | Published],
    seeds: int,
    faithful: str = "paper",
    columns: Sequence[Column] = (),
    stamp: int | None = None,
) -> Tally:
    """Fill ``grid``. columns: default: those of ``columns_of(grid)``. stamp: which protocol to show, counted from 1 in
    the order of ``Tally.stamps`` (most runs first; default: the first of published weights where ``runs`` holds such,
    else the first).

    Raises ValueError for a number that no protocol has, and for unlike numbers of learning rates.
    """
    columns = tuple(columns) or columns_of(grid)
    main = columns[0]
    average = main.reading.average
    matching = {line: [run for run in runs if run.likeness == line.likeness] for line in grid.lines} if runs else {}
    finished = {
        line: [run for run in matching.get(line, ()) if run.final and (run.averages or not average)]
        for line in grid.lines
    }
    distinct = {run.folder: run for found in finished.values() for run in found}
    measured = [run for run in distinct.values() if run.value(main.reading) is not None]
    stamp_by_folder = dict(
        zip(
            (run.folder for run in measured),
            agreed(run.stamp(main.reading) for run in measured),
            strict=True,
        )
    )
    stamps = dict(Counter(stamp_by_folder.values()).most_common())
    if stamp is not None and not 1 <= stamp <= len(stamps):
        raise ValueError(f"--stamp {stamp}: there are {len(stamps)} protocols")
    published = next((k for k, found in enumerate(stamps, 1) if found.weights == PUBLISHED), 1)
    shown = list(stamps)[(stamp or published) - 1] if stamps else None

    chosen = {
        line: {run.seed: run for run in found if shown and stamp_by_folder.get(run.folder) == shown}
        for line, found in finished.items()
    }
    samples = [[run.value(main.reading) for run in found.values()] for found in chosen.values()]
    entries = []
    for line in grid.lines:
        found = dict(sorted(chosen[line].items()))
        values = {column.name: _over_seeds(found.values(), column) for column in columns}
        value, printed = values[main.name], main.printed(line)
        gap = value.mean - printed if value and printed is not None and grid.comparable else None
        others = len(finished[line]) - len(found)
        judged = verdict(value, gap, samples, main, others)
        if gap is not None and shown.weights == PUBLISHED:
            judged = same_weights(gap, main.metric)
        entries.append(
            Entry(
                line,
                _size(line, shown),
                found,
                tuple(s for s in range(seeds) if s not in found),
                values,
                gap,
                judged,
                tuple(run for run in matching.get(line, ()) if not run.final),
                others,
            )
        )
    selections = select_rates(entries, main.metric)
    compared = _compared(_pairs(entries, selections), main)
    return Tally(grid, tuple(entries), shown, stamps, compared, faithful, columns, seeds, selections)


def columns_of(
    grid: Grid, metrics: Sequence[str] = (), epoch: str = "last", average: bool = False
) -> tuple[Column, ...]:
    """Return the columns of a table of ``grid``: ``metrics`` as ``Reading.of`` takes them, else the grid's, else those that
    the task shows. Raises ValueError where rows learn unlike tasks, and for a metric that their task lacks.
    """
    learned = {task_of(line.config): line for line in grid.lines}
    if len(learned) > 1:
        rows = ", ".join(line.label for line in learned.values())
        raise ValueError(f"{grid.name}: rows of unlike tasks share no metric ({rows}): choose rows with --only")
    (task,) = learned
    readings = [Reading.of(word, epoch, average) for word in metrics or grid.metrics or task.shown]
    return tuple(Column(reading, reading.looks_up(task.metrics)) for reading in readings)


def _over_seeds(runs: Iterable[Run | Published], column: Column) -> Interval | None:
    values = [value for run in runs if (value := run.value(column.reading)) is not None]
    return mean_interval(values) if values else None


def _size(line: Line, shown: Stamp | None) -> Size:
    """Of a paper's row as papers count: 1000 classes, 224 x 224. Of another line as it was run, if it was."""
    if line.printed or shown is None:
        return size_of(line.config)
    return size_of(line.config, shown.classes, shown.image_size)


def same_weights(gap: float, metric: Metric) -> str:
    """Return as printed | off: published weights give the printed number, but for decoder and resize."""
    return "as printed" if abs(gap) <= AS_PRINTED else _off(gap, metric)


def _off(gap: float, metric: Metric) -> str:
    return f"off ({'better' if metric.better(gap, 0) else 'worse'})"


def select_rates(entries: list[Entry], metric: Metric) -> tuple[Selection, ...]:
    """Return for each norm of a grid with learning rates the best one, selected in one way: the best mean, once all are
    finished. Raises ValueError where some have more to choose from (by --only).
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.line.tuned is not None:
            groups.setdefault(entry.line.tuned, []).append(entry)
    counts = {name: len(tried) for name, tried in groups.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise ValueError(
            f"these rows have unlike numbers of learning rates ({said}): choose them by norm "
            "(--only), not by rate"
        )
    best_of = max if metric.higher_is_better else min
    best = {
        name: best_of(tried, key=lambda e: e.value.mean) if not any(e.missing for e in tried) else None
        for name, tried in groups.items()
    }
    return tuple(Selection(name, tuple(tried), best[name], metric) for name, tried in groups.items())


def _pairs(entries: list[Entry], selections: tuple[Selection, ...]) -> list[tuple[Entry, Entry]]:
    """(baseline, entry): what is to be compared; of a grid with learning rates only the best of each norm."""
    if selections:
        best = {selection.name: selection.best for selection in selections}
        found = [(best.get(entry.line.tuned_versus), entry) for entry in best.values() if entry is not None]
    else:
        named = {(e.line.label, e.line.group): e for e in reversed(entries)}
        found = [(named.get((entry.line.versus, entry.line.group)), entry) for entry in entries]
    return [
        (base, entry)
        for base, entry in found
        if base is not None and base is not entry and base.runs and entry.runs
    ]


def verdict(
    value: Interval | None, gap: float | None, samples: list[list[float]], main: Column, elsewhere: int = 0
) -> str:
    """Return not run | other protocol | run (nothing printed to compare with) | off | within noise | reproduced.

    off: the gap is larger than the 95 % noise of a mean over our seeds against one printed number. within noise: it is
    not. reproduced: it is not, over at least 3 seeds, and the noise is below 0.5 points, so that it could have shown. A
    metric whose noise is not known has no verdict.
    """
    if value is None:
        return "other protocol" if elsewhere else "not run"
    noise = noise_of_gap(samples, value.n, USUAL_SD.get(main.reading.metric))
    if gap is None or math.isnan(noise):
        return "run"
    if abs(gap) > noise:
        return _off(gap, main.metric)
    return "reproduced" if value.n >= REPRODUCED_SEEDS and noise <= REPRODUCED_NOISE else "within noise"


def _compared(pairs: list[tuple[Entry, Entry]], main: Column) -> tuple[Comparison, ...]:
    found = []
    for base, entry in pairs:
        same = sorted(set(base.runs) & set(entry.runs))
        paired = len(same) > 1
        a, b = ([e.runs[s] for s in (same if paired else e.runs)] for e in (base, entry))
        values_a, values_b = ([run.value(main.reading) for run in runs] for runs in (a, b))
        methods = compare_methods(
            values_a,
            values_b,
            paired or (len(a) == len(b) == 1),
            *_images(a, b, main),
            usual_sd=USUAL_SD.get(main.reading.metric),
            small=small_of(main.metric),
        )
        found.append((base, entry, methods))
    tested = [i for i, (_, _, methods) in enumerate(found) if methods.difference.n > 1]
    corrected = dict(zip(tested, holm([found[i][2].p for i in tested]), strict=True))
    return tuple(Comparison(*parts, corrected.get(i)) for i, parts in enumerate(found))


def _images(
    a: list[Run | Published], b: list[Run | Published], main: Column
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return bool (runs, N) for both sides, whether each image counted; None where the metric is no mean over images, or
    some run did not keep what its weights made of them.
    """
    if not main.metric.per_image or not all(run.keeps_images(main.reading) for run in (*a, *b)):
        return None, None
    counted = np.stack([one[main.metric.per_image] for one in images_of([*a, *b], main.reading)])
    return counted[: len(a)], counted[len(a) :]


def hours(entry: Entry, known: list[Entry]) -> tuple[float | None, str]:
    """(hours times devices of one run, where the number is from): own runs, another line's by multiply-adds, or a V100's."""
    if entry.trained:
        return float(np.mean([run.device_hours for run in entry.trained])), "measured"
    config = entry.line.config
    for other in known:
        theirs = other.line.config
        if other.trained and theirs.data == config.data:
            scale = entry.size.macs / other.size.macs * config.settings.epochs / theirs.settings.epochs
            theirs = float(np.mean([run.device_hours for run in other.trained]))
            return scale * theirs, f"from {other.line.label}"
    if not config.data.name.startswith("imagenet"):
        return None, "unknown"
    macs = size_of(config, pixels=config.data.options.get("image_size", 224)).macs
    return 1_281_167 * config.settings.epochs * macs / V100_MACS / 3600, "rough, V100 with FP16"


def total_hours(tally: Tally) -> tuple[float, int, str]:
    """(hours times devices of all missing cells, cells without an estimate, where the numbers are from)."""
    total, unknown, origins = 0.0, 0, {}
    for entry in tally.entries:
        one, origin = hours(entry, list(tally.entries))
        if not entry.missing:
            continue
        if one is None:
            unknown += len(entry.missing)
        else:
            total += one * len(entry.missing)
            origins[origin] = None
    assert math.isfinite(total)
    return total, unknown, "; ".join(origins)
