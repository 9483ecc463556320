"""The report on two methods from their runs: which is better, by how much, and how sure one can be."""

from __future__ import annotations

import json

import numpy as np

from anorm.engine.runfolder import CARD
from anorm.study.records import Reading, Run, images_of, one_stamp
from anorm.study.statistics import (
    USUAL_SD,
    changes_by_class,
    compare_methods,
    compare_pair,
    small_of,
    words,
)


def report(a: list[Run], b: list[Run], word: str | None = None) -> str:
    """Return the comparison of two lists of runs. word: the metric, as ``Reading.of`` takes it (default: the one that
    chooses a run's best weights). Raises ValueError for unlike tasks, protocols or images.
    """
    runs = [*a, *b]
    for run in runs:
        if run.final is None:
            raise ValueError(f"{run.folder} is not finished: repeat its command")
        if run.task is not runs[0].task:
            raise ValueError(f"{runs[0].folder} and {run.folder} learn unlike tasks, which share no metric")
    reading = Reading.of(word or runs[0].task.best)
    metric = reading.looks_up(runs[0].task.metrics)
    for run in runs:
        if run.value(reading) is None:
            raise ValueError(f"{run.folder} has no {reading}: {_has(run)}")
    stamp = one_stamp(run.stamp(reading) for run in runs)
    a, b = (sorted(runs, key=lambda run: run.seed) for runs in (a, b))
    name_a, name_b = (_name(runs) for runs in (a, b))
    seeds_a, seeds_b = [r.seed for r in a], [r.seed for r in b]
    if name_a == name_b:
        name_a, name_b = "a", "b"
    images = images_of([*a, *b], reading) if metric.per_image else []
    right = [None, None]
    if metric.per_image:
        right = np.split(np.stack([one[metric.per_image] for one in images]), [len(a)])
    found = compare_methods(
        [r.value(reading) for r in a],
        [r.value(reading) for r in b],
        seeds_a == seeds_b,
        *right,
        usual_sd=USUAL_SD.get(reading.metric),
        small=small_of(metric),
    )
    lines = [
        f"protocol: {stamp}",
        f"a: {name_a}, seeds {seeds_a}; b: {name_b}, seeds {seeds_b}",
        words(found, name_a, name_b, metric, usual_sd=USUAL_SD.get(reading.metric)),
    ]
    if word:
        lines.insert(1, f"metric: {reading.measured(metric)}")
    if found.bootstrap:
        lines.append(
            f"seeds resampled, then images: [{found.bootstrap.low:+.2f}, {found.bootstrap.high:+.2f}]"
        )
    if found.pairing_gain is not None:
        used = "equal seeds are paired" if found.paired else "equal seeds are not paired"
        lines.append(
            f"pairing {'lowers' if found.pairing_gain > 0 else 'raises'} the variance by {abs(found.pairing_gain):.0%}: {used}"
        )
    if not metric.per_image:
        return "\n".join(
            [*lines, f"{metric.heading} is no mean over images: the runs are compared over seeds alone"]
        )
    for i, (one_a, one_b) in enumerate(zip(*right, strict=False)):
        pair = compare_pair(one_a, one_b)
        lines.append(
            f"runs {a[i].seed} and {b[i].seed}: {pair.difference.mean:+.2f} points over images [{pair.difference.low:+.2f}, "
            f"{pair.difference.high:+.2f}], only a right {pair.only_a}, only b right {pair.only_b}, McNemar p = "
            f"{pair.p_exact:.2g} (chi-square {pair.p_chi2:.2g}), agreement {pair.agreement:.1%}"
        )
    return "\n".join([*lines, *_classes(a[0], images[0].columns.get("label"), *right)])


def _has(run: Run) -> str:
    """Return what a run was evaluated by, in words."""
    pairs = ", ".join(f"{images}/{stats}" for images, stats in run.pairs)
    known = [name for name in run.task.metrics if name in run.final]
    return f"it has {', '.join(known)} on {pairs} (--metric NAME@SET/STATISTICS)"


def _classes(
    run: Run, label: np.ndarray | None, images_a: np.ndarray, images_b: np.ndarray, shown: int = 5
) -> list[str]:
    """Return lines on the classes that gain and lose most; none where images have no class."""
    if label is None:
        return []
    names = json.loads((run.folder / CARD).read_text())["classes"]
    found = changes_by_class(images_a, images_b, label)
    gain = [f"{names[k]} {points:+.1f} ({n} images)" for k, points, n in found if points > 0]
    lose = [f"{names[k]} {points:+.1f} ({n} images)" for k, points, n in reversed(found) if points < 0]
    return [
        f"{word} most: {', '.join(classes[:shown]) or 'none'}"
        for word, classes in (("gain", gain), ("lose", lose))
    ]


def _name(runs: list[Run]) -> str:
    names = dict.fromkeys(run.choices["norm"] for run in runs)
    return "+".join(names)
