"""A tally as one HTML file: table with sort and filter, curves, comparisons. It opens from disk and asks nothing of a network.

The page's frame, style and script are ``page.html``; here its parts are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

from anorm.study.formats import columns, comparison, header, missing
from anorm.study.tally import Comparison, Entry, Tally

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 58, 8, 12, 40
COLOURS = 8
SIZES = {"k": 1e3, "M": 1e6, "G": 1e9}
DASHES = ("", "6 3", "2 3", "8 3 2 3")
Point = tuple[float, float]


def html(tally: Tally) -> str:
    """The page."""
    groups = list(dict.fromkeys(e.line.group for e in tally.entries))
    return page(
        {
            "title": escape(tally.title),
            "head": "".join(
                f'<p class="soft">{escape(line)}</p>' for line in (f"{header(tally)}.", *tally.notes[:2])
            ),
            "groups": "".join(f"<option>{escape(group)}</option>" for group in groups),
            "heading": "Table",
            "hint": "such as an or not run",
            "table": _table(tally),
            "body": _curves(tally) + _comparisons(tally) + _notes(tally) + _missing(tally),
        }
    )


def page(parts: dict[str, str]) -> str:
    """The frame with its parts: title, head, heading, groups, hint, table, body, each HTML."""
    frame = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    for name, content in parts.items():
        frame = frame.replace(f"<!--{name}-->", content)
    return frame


def _table(tally: Tally) -> str:
    names = columns(tally)
    several = len({e.line.group for e in tally.entries}) > 1
    heads = [*names, *(["group"] if several else [])]
    cells = "".join(
        f'<th scope="col"{_words(name)}><button type="button">{escape(name)}</button></th>' for name in heads
    )
    rows = []
    for entry in tally.entries:
        shown = {name: cell(entry) for name, cell in names.items()} | (
            {"group": entry.line.group} if several else {}
        )
        tds = "".join(
            f"<td{_words(name, entry)}{_sorted_by(name, text)}>{escape(text)}</td>"
            for name, text in shown.items()
        )
        rows.append(f'<tr data-group="{escape(entry.line.group)}">{tds}</tr>')
    return f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody>"


def _words(name: str, entry: Entry | None = None) -> str:
    """The class of a cell: words stand left; a verdict has its colour."""
    classes = ["words"] if name in ("Method", "verdict", "group") else []
    if entry and name == "verdict":
        classes.append(entry.verdict.split()[0])
    return f' class="{" ".join(classes)}"' if classes else ""


def _sorted_by(name: str, text: str) -> str:
    """The number that a cell is sorted by, where it shows more than that."""
    if name in ("Method", "verdict", "group") or text == "-":
        return ""
    number, *unit = text.split()
    return f' data-value="{float(number) * SIZES.get("".join(unit), 1)}"'


def _curves(tally: Tally) -> str:
    """Error by epoch and training loss, for the lines that have runs: the mean over seeds, and every seed thin."""
    entries = [e for e in tally.entries if e.runs]
    if not entries:
        return ""
    several = len({e.line.group for e in entries}) > 1
    names = [f"{e.line.label} ({e.line.group})" if several else e.line.label for e in entries]
    errors = [
        [[(v["epoch"], 100 - v["top1"]) for v in run.evaluations()] for run in e.runs.values()]
        for e in entries
    ]
    losses = [[_by_epoch(run.events) for run in e.runs.values()] for e in entries]
    charts = {"top-1 error on the evaluation images, percent": errors, "training loss": losses}
    return curves(names, charts, "; thick: mean over seeds")


def curves(names: list[str], charts: dict[str, list[list[list[Point]]]], note: str = "") -> str:
    """A chart a title, with a legend that switches lines. charts: for each name its curves, (epoch, value) each."""
    legend = "".join(
        f'<label class="k{i % COLOURS}"><input type="checkbox" checked value="{i}"><span>{escape(name)}</span></label>'
        for i, name in enumerate(names)
    )
    drawn = "".join(_chart(title, names, series, note) for title, series in charts.items())
    return f'<h2>Curves</h2><div class="legend">{legend}</div><div class="charts">{drawn}</div>'


def _by_epoch(events: list[dict]) -> list[Point]:
    """(epoch, mean training loss) of a run."""
    found: dict[int, list[float]] = {}
    for e in events:
        if e["event"] == "train" and isinstance(e["loss"], float):
            found.setdefault(e["epoch"], []).append(e["loss"])
    return [(epoch, sum(values) / len(values)) for epoch, values in found.items()]


def _chart(title: str, names: list[str], series: list[list[list[Point]]], note: str) -> str:
    points = [p for runs in series for run in runs for p in run]
    if not points:
        return ""
    x_ticks, y_ticks = (
        ticks(min(p[0] for p in points), max(p[0] for p in points), whole=True),
        ticks(*_range(p[1] for p in points)),
    )

    def at(p: Point) -> str:
        return f"{_scale(p[0], x_ticks, LEFT, WIDTH - RIGHT):.1f},{_scale(p[1], y_ticks, HEIGHT - BOTTOM, TOP):.1f}"

    parts = []
    for tick in y_ticks:
        y = _scale(tick, y_ticks, HEIGHT - BOTTOM, TOP)
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in x_ticks:
        parts.append(
            f'<text x="{_scale(tick, x_ticks, LEFT, WIDTH - RIGHT):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">epoch</text>')
    for i, (name, runs) in enumerate(zip(names, series, strict=True)):
        dash = f' stroke-dasharray="{DASHES[i // COLOURS % len(DASHES)]}"' if i >= COLOURS else ""
        lines = (
            [f'<polyline class="seed" points="{" ".join(map(at, run))}"/>' for run in runs]
            if len(runs) > 1
            else []
        )
        mean = mean_curve(runs)
        lines.append(f'<polyline class="curve"{dash} points="{" ".join(map(at, mean))}"/>')
        lines += [
            f'<circle class="dot" cx="{at(p).split(",")[0]}" cy="{at(p).split(",")[1]}" r="2.5">'
            f"<title>{escape(name)}, epoch {p[0]:g}: {p[1]:.2f}</title></circle>"
            for p in mean
        ]
        parts.append(f'<g class="k{i % COLOURS}" data-line="{i}">{"".join(lines)}</g>')
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by epoch">{"".join(parts)}</svg>'
        f"<figcaption>{escape(title)}{escape(note)}</figcaption></figure>"
    )


def mean_curve(runs: list[list[Point]]) -> list[Point]:
    """The mean over runs at every x that all of them have."""
    by_x = [dict(run) for run in runs]
    shared = sorted(set.intersection(*(set(run) for run in by_x)))
    return [(x, sum(run[x] for run in by_x) / len(by_x)) for x in shared]


def _range(values: Iterable[float]) -> Point:
    found = list(values)
    return min(found), max(found)


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers, about five, the first not above ``low`` and the last not below ``high``."""
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


def _comparisons(tally: Tally) -> str:
    """Every comparison in words, and as an interval about zero."""
    if not tally.comparisons:
        return ""
    told = "".join(f"<li>{escape(comparison(c))}</li>" for c in tally.comparisons)
    return (
        f'<h2>Comparisons</h2><p class="soft">Points of top-1 accuracy against the baseline; lines are 95 % intervals over seeds, '
        f"p values are corrected by Holm's method.</p>{_forest(tally.comparisons)}<ul>{told}</ul>"
    )


def _forest(comparisons: tuple[Comparison, ...]) -> str:
    known = [c for c in comparisons if c.found.difference.n > 1]
    if not known:
        return ""
    edges = [v for c in known for v in (c.found.difference.low, c.found.difference.high)]
    marks = ticks(min(0.0, *edges), max(0.0, *edges))
    height, parts = 30 * len(known) + 30, []
    for tick in marks:
        x = _scale(tick, marks, 20, WIDTH - 20)
        parts.append(
            f'<line class="axis{" zero" if tick == 0 else ""}" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 22}"/>'
            f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{_signed(tick)}</text>'
        )
    for i, c in enumerate(known):
        y, d = 30 * i + 22, c.found.difference
        low, mean, high = (_scale(v, marks, 20, WIDTH - 20) for v in (d.low, d.mean, d.high))
        parts.append(
            f'<g class="k0"><text class="name" x="20" y="{y - 8}">{escape(c.entry.line.label)} - {escape(c.base.line.label)}</text>'
            f'<line class="curve" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/><circle class="dot" cx="{mean:.1f}" cy="{y}" r="4"/></g>'
        )
    return f'<figure style="max-width:40rem"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="differences with intervals">{"".join(parts)}</svg></figure>'


def _signed(value: float) -> str:
    return f"{value:+g}" if value else "0"


def _notes(tally: Tally) -> str:
    said = [*tally.notes[2:], *(f"{mark}: {meaning}" for mark, meaning in tally.grid.marks.items())]
    return f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in said)}</ul>" if said else ""


def _missing(tally: Tally) -> str:
    commands = missing(tally)
    return (
        f"<h2>Missing</h2><details><summary>{len(commands)} cells</summary><pre>{escape(chr(10).join(commands))}</pre></details>"
        if commands
        else ""
    )
