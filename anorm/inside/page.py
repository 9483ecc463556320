"""One run as one HTML file: its numbers under their stamp, curves, layers, and the pictures of ``look_inside``.

The page's frame is ``anorm/study/page.html``, as for a table; it opens from disk and asks nothing of a network.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from anorm.inside.probes import Look
from anorm.inside.sections import Section
from anorm.study.page import curves, page
from anorm.study.records import Run

__all__ = ["html"]

Point = tuple[float, float]
MOST = 200
"""Points of a curve."""


def html(run: Run, sections: Sequence[Section] = (), layers: dict[str, Look] | None = None) -> str:
    """The page. layers: what the table shows a row each of, with the sections' columns; without, the evaluations."""
    rows = _layers(sections, layers) if layers else _evaluations(run)
    groups = list(dict.fromkeys(row["stage"] for row in rows if "stage" in row))
    what = "{arch} with {norm} on {data}".format(**run.choices)
    return page({
        "title": escape(f"{what}: {run.folder.resolve().name}"),
        "head": "".join(f'<p class="soft">{escape(line)}</p>' for line in standing(run)),
        "groups": "".join(f"<option>{escape(group)}</option>" for group in groups),
        "heading": "Layers" if layers else "Evaluations",
        "hint": "such as layer2" if layers else "by their numbers",
        "table": _table(rows),
        "body": _curves(run) + "".join(map(_section, sections)),
    })  # fmt: skip


def standing(run: Run) -> list[str]:
    """What came of the run, in words: numbers with their stamp."""
    signed = f"signature {run.signature}"
    if run.final is None:
        last = max((e["step"] for e in run.events if "step" in e), default=0)
        return [f"Not finished: at step {last}.", f"{signed}."]
    final = run.final
    return [
        f"Top-1 {final['top1']:.2f} %, top-5 {final['top5']:.2f} % after the last epoch; best top-1 "
        f"{final['best_top1']:.2f} % after epoch {final['best_epoch']}.",
        f"Protocol: {run.stamp()}.",
        f"{final['seconds']:,.0f} s on {run.processes} process{'es' if run.processes > 1 else ''}, "
        f"{final['images_per_second']:.0f} images/s; {signed}.",
    ]


def _layers(sections: Sequence[Section], layers: dict[str, Look]) -> list[dict[str, str]]:
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
    return [
        {
            "epoch": str(e["epoch"]),
            "top-1": f"{e['top1']:.2f}",
            "top-5": f"{e['top5']:.2f}",
            "loss": f"{float(e['loss']):.4f}",
        }
        for e in run.evaluations()
    ]


WORDS = ("layer", "law", "stage")


def _table(rows: list[dict[str, str]]) -> str:
    names = list(rows[0]) if rows else ["epoch", "top-1", "top-5", "loss"]
    words = {name: ' class="words"' if name in WORDS else "" for name in names}
    heads = "".join(
        f'<th scope="col"{words[n]}><button type="button">{escape(n)}</button></th>' for n in names
    )
    lines = []
    for row in rows:
        cells = "".join(f"<td{words[name]}>{escape(row[name])}</td>" for name in names)
        lines.append(f'<tr data-group="{escape(row.get("stage", ""))}">{cells}</tr>')
    return f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"


def _curves(run: Run) -> str:
    """Error, loss and learning rate by epoch."""
    evaluations = run.evaluations()
    trained = [e for e in run.events if e["event"] == "train"]
    if not trained:
        return ""
    # an evaluation tells step and epoch; before the first, a report's epoch is the one it belongs to
    steps = (
        evaluations[-1]["step"] / evaluations[-1]["epoch"]
        if evaluations
        else trained[-1]["step"] / trained[-1]["epoch"]
    )
    error, loss, rate = "top-1 error on the evaluation images, percent", "loss", "learning rate"
    series = {
        "training": {loss: _points(trained, "loss", steps), rate: _points(trained, "lr", steps)},
        "evaluation": {error: _errors(evaluations, "top1", steps), loss: _points(evaluations, "loss", steps)},
        "average of weights": {error: _errors(evaluations, "ema_top1", steps)},
    }
    names = [name for name, parts in series.items() if any(parts.values())]
    charts = {title: [[series[name].get(title, [])] for name in names] for title in (error, loss, rate)}
    return curves(names, charts)


def _errors(events: list[dict], key: str, steps_per_epoch: float) -> list[Point]:
    return [(epoch, 100 - accuracy) for epoch, accuracy in _points(events, key, steps_per_epoch)]


def _points(events: list[dict], key: str, steps_per_epoch: float) -> list[Point]:
    """(epoch, value) of the events that have a finite one, at most MOST, the last among them."""
    found = [
        (e["step"] / steps_per_epoch, float(e[key])) for e in events if isinstance(e.get(key), (int, float))
    ]
    return found[:: -max(1, -(-len(found) // MOST))][::-1]


def _section(section: Section) -> str:
    said = "".join(f"<li>{escape(line)}</li>" for line in section.said)
    drawn = "".join(
        f'<figure><img alt="{escape(p.caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(p.png).decode()}">'
        f"<figcaption>{escape(p.caption)}</figcaption></figure>"
        for p in section.pictures
    )
    charts = f'<div class="charts">{drawn}</div>' if drawn else ""
    return f"<h2>{escape(section.title)}</h2><ul>{said}</ul>{charts}"
