"""Compare two norms from what their runs stored: which is better, by how much, and how sure one can be.

    python tools/judge.py RUN_BN RUN_AN                           one pair of runs
    python tools/judge.py --a runs/*-bn-* --b runs/*-an-*         two methods, several seeds of each

b - a is printed, in points of top-1 accuracy. Equal seeds are paired: their runs share the order of images, crops, mixup
draws and initial convolutions; pairing is used when it lowers the variance, which is measured. Runs that were evaluated
in unlike ways (resolution, statistics, last or best epoch, dtype ...) are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np
from judgement import changes_by_class, compare_methods, compare_pair, words
from records import Run, images_of, one_stamp, open_run

from anorm.engine.commandline import user_errors
from anorm.engine.runfolder import CARD


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


def main(argv: list[str]) -> int:
    """Print the comparison; the exit status is 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pair", nargs="*", type=Path, metavar="RUN", help="two run folders")
    parser.add_argument("--a", nargs="+", type=Path, default=[], metavar="RUN")
    parser.add_argument("--b", nargs="+", type=Path, default=[], metavar="RUN")
    asked = parser.parse_args(argv)
    with user_errors() as outcome:
        if (
            asked.pair
            and (len(asked.pair) != 2 or asked.a or asked.b)
            or not asked.pair
            and not (asked.a and asked.b)
        ):
            raise ValueError("give two run folders, or --a RUN... --b RUN...")
        a, b = (asked.pair[:1], asked.pair[1:]) if asked.pair else (asked.a, asked.b)
        print(report([open_run(f) for f in a], [open_run(f) for f in b]))
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
