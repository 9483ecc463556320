"""A tally as one HTML file: table with sort and filter, curves, comparisons. It opens from disk and asks nothing of a network.

Markup, style and script are in ``templates``; here is what they show.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import jinja2

from anorm.study.formats import as_shown, columns, compared, comparison, header, missing
from anorm.study.records import Run
from anorm.study.tally import Column, Comparison, Entry, Tally

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 58, 8, 12, 40
COLOURS = 8
SIZES = {"k": 1e3, "M": 1e6, "G": 1e9}
DASHES = ("", "6 3", "2 3", "8 3 2 3")
WORDS = ("Method", "verdict", "group")
Point = tuple[float, float]


def html(tally: Tally) -> str:
    """Return the page."""
    names, several = columns(tally), len({e.line.group for e in tally.entries}) > 1
    return render(
        "table.html",
        title=tally.title,
        head=[f"{header(tally)}.", *tally.notes[:2]],
        groups=list(dict.fromkeys(e.line.group for e in tally.entries)),
        heading="Table",
        hint="such as an or not run",
        columns=[*names, *(["group"] if several else [])],
        words=WORDS,
        rows=[_row(entry, names, several) for entry in tally.entries],
        **_curves(tally),
        comparisons=[comparison(c, tally) for c in tally.comparisons],
        compared=compared(tally),
        forest=_forest(tally.comparisons),
        notes=[*tally.notes[2:], *(f"{mark}: {meaning}" for mark, meaning in tally.grid.marks.items())],
        missing=missing(tally),
    )


def render(template: str, package: str = "anorm.study", **values: object) -> str:
    """Return a template of ``package``, or of this one, filled; text in ``values`` is escaped."""
    packages = dict.fromkeys((package, "anorm.study"))
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment.get_template(template).render({"colours": COLOURS, "charts": [], "curves": []} | values)


@dataclass(frozen=True)
class Cell:
    """A cell of the page's table. number: what it is sorted by, where that is not its text. classes: of CSS."""

    text: str
    number: float | None = None
    classes: str = ""


@dataclass(frozen=True)
class Row:
    cells: list[Cell]
    group: str = ""


def _row(entry: Entry, names: dict, several: bool) -> Row:
    shown = {name: cell(entry) for name, cell in names.items()} | ({"group": entry.line.group} if several else {})
    return Row([_cell(name, text) for name, text in shown.items()], entry.line.group)


def _cell(name: str, text: str) -> Cell:
    """Return the cell: words stand left, a verdict has its colour, a number is sorted by its size and not by its unit."""
    if name in WORDS:
        return Cell(text, classes="words" + (f" {text.split()[0]}" if name == "verdict" else ""))
    if text == "-":
        return Cell(text)
    number, *unit = text.split()
    return Cell(text, float(number) * SIZES.get("".join(unit), 1))


# ---- curves ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick:
    at: float
    text: str
    zero: bool = False


@dataclass(frozen=True)
class Dot:
    x: str
    y: str
    text: str


@dataclass(frozen=True)
class Line:
    """A curve: the mean over runs with a dot a point, and each run where there are several, as points of SVG."""

    colour: int
    dash: str
    runs: list[str]
    mean: str
    dots: list[Dot]


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = field(default=WIDTH - RIGHT)
    bottom: int = field(default=HEIGHT - BOTTOM)


def _curves(tally: Tally) -> dict[str, list]:
    """Return charts of the first column's metric and of the training loss, for the lines that have runs."""
    entries = [e for e in tally.entries if e.runs]
    several, main = len({e.line.group for e in entries}) > 1, tally.main
    names = [f"{e.line.label} ({e.line.group})" if several else e.line.label for e in entries]
    of_metric = [[metric_by_epoch(run, main) for run in e.runs.values()] for e in entries]
    losses = [[_by_epoch(run.events) for run in e.runs.values()] for e in entries]
    return curves(names, {curve_title(main): of_metric, "training loss": losses}, "; thick: mean over seeds")


def curve_title(column: Column) -> str:
    """Return the words above a metric's curve."""
    percent = ", percent" if column.metric.unit == "%" else ""
    return f"{column.heading}{' error' if column.metric.as_error else ''} on the evaluation images{percent}"


def metric_by_epoch(run: Run, column: Column) -> list[Point]:
    """Return (epoch, value as shown) of the evaluations that have the metric, of the plain weights."""
    found = [(e["epoch"], e.get(column.reading.metric)) for e in run.evaluations(column.reading)]
    return [(x, as_shown(y, column.metric)) for x, y in found if isinstance(y, (int, float))]


def curves(names: list[str], charts: dict[str, list[list[list[Point]]]], note: str = "") -> dict[str, list]:
    """Return what the frame needs for a chart a title, with a legend that switches lines.

    charts: for each name its curves, (epoch, value) each.
    """
    drawn = [_chart(title, names, series, note) for title, series in charts.items()]
    return {"curves": names, "charts": [chart for chart in drawn if chart]}


def _by_epoch(events: list[dict]) -> list[Point]:
    """Return (epoch, mean training loss) of a run."""
    found: dict[int, list[float]] = {}
    for e in events:
        if e["event"] == "train" and isinstance(e["loss"], float):
            found.setdefault(e["epoch"], []).append(e["loss"])
    return [(epoch, sum(values) / len(values)) for epoch, values in found.items()]


def _chart(title: str, names: list[str], series: list[list[list[Point]]], note: str) -> Chart | None:
    points = [p for runs in series for run in runs for p in run]
    if not points:
        return None
    x_ticks = ticks(min(p[0] for p in points), max(p[0] for p in points), whole=True)
    y_ticks = ticks(*_range(p[1] for p in points))

    def at(p: Point) -> tuple[str, str]:
        x, y = _scale(p[0], x_ticks, LEFT, WIDTH - RIGHT), _scale(p[1], y_ticks, HEIGHT - BOTTOM, TOP)
        return f"{x:.1f}", f"{y:.1f}"

    def path(run: list[Point]) -> str:
        return " ".join(",".join(at(p)) for p in run)

    lines = []
    for i, (name, runs) in enumerate(zip(names, series, strict=True)):
        mean = mean_curve(runs)
        dots = [Dot(*at(p), f"{name}, epoch {p[0]:g}: {p[1]:.2f}") for p in mean]
        thin = [path(run) for run in runs] if len(runs) > 1 else []
        dash = DASHES[i // COLOURS % len(DASHES)]
        lines.append(Line(i % COLOURS, dash, thin, path(mean), dots))
    return Chart(
        title,
        note,
        [Tick(round(_scale(t, x_ticks, LEFT, WIDTH - RIGHT), 1), f"{t:g}") for t in x_ticks],
        [Tick(round(_scale(t, y_ticks, HEIGHT - BOTTOM, TOP), 1), f"{t:g}") for t in y_ticks],
        lines,
    )


def mean_curve(runs: list[list[Point]]) -> list[Point]:
    """Return the mean over runs at every x that all of them have."""
    by_x = [dict(run) for run in runs]
    shared = sorted(set.intersection(*(set(run) for run in by_x)))
    return [(x, sum(run[x] for run in by_x) / len(by_x)) for x in shared]


def _range(values: Iterable[float]) -> Point:
    found = list(values)
    return min(found), max(found)


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return round numbers, about five, the first not above ``low`` and the last not below ``high``."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _scale(value: float, marks: list[float], start: float, end: float) -> float:
    return start + (value - marks[0]) / (marks[-1] - marks[0]) * (end - start)


# ---- comparisons -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whisker:
    """A difference with its interval, in the forest's coordinates."""

    name: str
    y: int
    low: str
    mean: str
    high: str


@dataclass(frozen=True)
class Forest:
    """Every difference that has an interval, about zero."""

    height: int
    ticks: list[Tick]
    lines: list[Whisker]
    width: int = WIDTH


def _forest(comparisons: tuple[Comparison, ...]) -> Forest | None:
    known = [c for c in comparisons if c.found.difference.n > 1]
    if not known:
        return None
    edges = [v for c in known for v in (c.found.difference.low, c.found.difference.high)]
    marks = ticks(min(0.0, *edges), max(0.0, *edges))

    def at(value: float) -> str:
        return f"{_scale(value, marks, 20, WIDTH - 20):.1f}"

    lines = []
    for i, c in enumerate(known):
        d, name = c.found.difference, f"{c.entry.line.label} - {c.base.line.label}"
        lines.append(Whisker(name, 30 * i + 22, at(d.low), at(d.mean), at(d.high)))
    marked = [Tick(float(at(t)), f"{t:+g}" if t else "0", zero=t == 0) for t in marks]
    return Forest(30 * len(known) + 30, marked, lines)
