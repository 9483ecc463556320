"""One run as one HTML file: its numbers under their stamp, curves, layers, and the pictures of ``look_inside``.

The frame is a table's (``anorm/study/templates``); the page opens from disk and asks nothing of a network.
"""

from __future__ import annotations

from collections.abc import Sequence

from anorm.inside.probes import LayerProbe
from anorm.inside.sections import Section
from anorm.study.page import Cell, Row, curve_title, curves, metric_by_epoch, render
from anorm.study.records import Reading, Run
from anorm.study.tally import Column

__all__ = ["html"]

Point = tuple[float, float]
MOST = 200
"""Points of a curve."""
WORDS = ("layer", "law", "stage", "set", "statistics")


def html(
    run: Run,
    sections: Sequence[Section] = (),
    layers: dict[str, LayerProbe] | None = None,
    metric: str | None = None,
) -> str:
    """Return the page. layers: what the table shows a row each of, with the sections' columns; without, the evaluations.
    metric: whose curve is drawn, as ``Reading.of`` takes it (default: the one that chooses the best weights).
    """
    rows = _layers(sections, layers) if layers else _evaluations(run)
    groups = list(dict.fromkeys(row["stage"] for row in rows if "stage" in row))
    what = "{arch} with {norm} on {data}".format(**run.choices)
    names = list(rows[0]) if rows else ["epoch", *(run.task.metrics[name].heading for name in run.task.shown)]
    return render(
        "run.html",
        "anorm.inside",
        title=f"{what}: {run.folder.resolve().name}",
        head=standing(run),
        groups=groups,
        heading="Layers" if layers else "Evaluations",
        hint="such as layer2" if layers else "by their numbers",
        columns=names,
        words=WORDS,
        rows=[Row([_cell(name, row[name]) for name in names], row.get("stage", "")) for row in rows],
        **_curves(run, metric),
        sections=sections,
    )


def _cell(name: str, text: str) -> Cell:
    return Cell(text, classes="words" if name in WORDS else "")


def standing(run: Run) -> list[str]:
    """Return what came of the run, in words: numbers with their stamp."""
    signed = f"signature {run.signature}"
    if run.final is None:
        last = max((e["step"] for e in run.events if "step" in e), default=0)
        return [f"Not finished: at step {last}.", f"{signed}."]
    final, task = run.final, run.task
    best = task.metrics[task.best]
    values = ", ".join(
        f"{task.metrics[name].heading} {task.metrics[name].text(final[name])}" for name in task.shown
    )
    return [
        f"{values[0].upper()}{values[1:]} after the last epoch; best {best.heading} "
        f"{best.text(final[f'best_{task.best}'])} after epoch {final['best_epoch']}.",
        f"Protocol: {run.stamp(Reading(task.best))}.",
        f"{final['seconds']:,.0f} s on {run.processes} process{'es' if run.processes > 1 else ''}, "
        f"{final['images_per_second']:.0f} images/s on {run.machine}; {signed}.",
    ]


def _layers(sections: Sequence[Section], layers: dict[str, LayerProbe]) -> list[dict[str, str]]:
    columns = {name: values for section in sections for name, values in section.columns.items()}
    return [
        {
            "layer": name,
            "law": one.law,
            "stage": f"stage {one.stage}" if one.stage else "-",
            "channels": str(one.channels),
        }
        | {column: values.get(name, "-") for column, values in columns.items()}
        for name, one in layers.items()
    ]


def _evaluations(run: Run) -> list[dict[str, str]]:
    """Return a row for each evaluation, with every metric that it has."""
    pairs, rows = run.pairs, []
    for e in (e for e in run.events if e["event"] == "eval"):
        row = {"epoch": str(e["epoch"])}
        if len(pairs) > 1:
            row |= {"set": e["set"], "statistics": e["stats"]}
        known = {name: metric for name, metric in run.task.metrics.items() if name in e}
        rows.append(row | {m.heading: f"{float(e[name]):.{m.digits}f}" for name, m in known.items()})
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "-") for name in names} for row in rows]


def _curves(run: Run, word: str | None) -> dict[str, list]:
    """Return charts of the metric, loss and learning rate by epoch."""
    trained = [e for e in run.events if e["event"] == "train"]
    if not trained:
        return {}
    reading = Reading.of(word or run.task.best)
    column = Column(reading, reading.looks_up(run.task.metrics))
    evaluations = run.evaluations(reading)
    # an evaluation tells step and epoch; before the first, a report's epoch is the one it belongs to
    last = (evaluations or trained)[-1]
    steps = last["step"] / last["epoch"]
    title, loss, rate = curve_title(column), "loss", "learning rate"
    average = Column(Reading(f"ema_{reading.metric}", reading.set, reading.stats), column.metric)
    series = {
        "training": {loss: _points(trained, "loss", steps), rate: _points(trained, "lr", steps)},
        "evaluation": {title: metric_by_epoch(run, column)},
        "average of weights": {title: metric_by_epoch(run, average)},
    }
    if title != loss:
        series["evaluation"][loss] = _points(evaluations, "loss", steps)
    names = [name for name, parts in series.items() if any(parts.values())]
    charts = {t: [[series[name].get(t, [])] for name in names] for t in dict.fromkeys((title, loss, rate))}
    return curves(names, charts)


def _points(events: list[dict], key: str, steps_per_epoch: float) -> list[Point]:
    """Return (epoch, value) of the events that have a finite one, at most MOST, the last among them."""
    found = [
        (e["step"] / steps_per_epoch, float(e[key])) for e in events if isinstance(e.get(key), (int, float))
    ]
    return found[:: -max(1, -(-len(found) // MOST))][::-1]
