"""The report on two methods from their runs: which is better, by how much, and how sure one can be."""

from __future__ import annotations

import json

import numpy as np

from anorm.engine.runfolder import CARD
from anorm.study.records import Run, images_of, one_stamp
from anorm.study.statistics import changes_by_class, compare_methods, compare_pair, words


def report(a: list[Run], b: list[Run]) -> str:
    """The comparison of two lists of ``runs.Run``. Raises ValueError for unlike protocols or images."""
    for run in (*a, *b):
        if run.final is None:
            raise ValueError(f"{run.folder} is not finished: repeat its command")
    stamp = one_stamp(run.stamp() for run in (*a, *b))
    a, b = (sorted(runs, key=lambda run: run.seed) for runs in (a, b))
    name_a, name_b = (_name(runs) for runs in (a, b))
    images_a, images_b = np.split(images_of([*a, *b]), [len(a)])
    seeds_a, seeds_b = [r.seed for r in a], [r.seed for r in b]
    if name_a == name_b:
        name_a, name_b = "a", "b"
    found = compare_methods(
        [r.final["top1"] for r in a], [r.final["top1"] for r in b], seeds_a == seeds_b, images_a, images_b
    )
    lines = [
        f"protocol: {stamp}",
        f"a: {name_a}, seeds {seeds_a}; b: {name_b}, seeds {seeds_b}",
        words(found, name_a, name_b),
    ]
    if found.bootstrap:
        lines.append(
            f"seeds resampled, then images: [{found.bootstrap.low:+.2f}, {found.bootstrap.high:+.2f}]"
        )
    if found.pairing_gain is not None:
        used = "equal seeds are paired" if found.paired else "equal seeds are not paired"
        lines.append(
            f"pairing {'lowers' if found.pairing_gain > 0 else 'raises'} the variance by {abs(found.pairing_gain):.0%}: {used}"
        )
    for i, (one_a, one_b) in enumerate(zip(images_a, images_b, strict=False)):
        pair = compare_pair(one_a, one_b)
        lines.append(
            f"runs {a[i].seed} and {b[i].seed}: {pair.difference.mean:+.2f} points over images [{pair.difference.low:+.2f}, "
            f"{pair.difference.high:+.2f}], only a right {pair.only_a}, only b right {pair.only_b}, McNemar p = "
            f"{pair.p_exact:.2g} (chi-square {pair.p_chi2:.2g}), agreement {pair.agreement:.1%}"
        )
    return "\n".join([*lines, *_classes(a[0], images_a, images_b)])


def _classes(run: Run, images_a: np.ndarray, images_b: np.ndarray, shown: int = 5) -> list[str]:
    """The classes that gain and lose most."""
    names = json.loads((run.folder / CARD).read_text())["classes"]
    found = changes_by_class(images_a, images_b, run.images.label)
    gain = [f"{names[k]} {points:+.1f} ({n} images)" for k, points, n in found if points > 0]
    lose = [f"{names[k]} {points:+.1f} ({n} images)" for k, points, n in reversed(found) if points < 0]
    return [
        f"{word} most: {', '.join(classes[:shown]) or 'none'}"
        for word, classes in (("gain", gain), ("lose", lose))
    ]


def _name(runs: list[Run]) -> str:
    names = dict.fromkeys(run.choices["norm"] for run in runs)
    return "+".join(names)
