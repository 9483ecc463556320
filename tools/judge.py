"""Compare two norms from what their runs stored: which is better, by how much, and how sure one can be.

    python tools/judge.py RUN_BN RUN_AN                           one pair of runs
    python tools/judge.py --a runs/*-bn-* --b runs/*-an-*         two methods, several seeds of each
    python tools/judge.py RUN_BN RUN_AN --metric ece              by another metric; NAME@SET/STATISTICS for one of several

b - a is printed, by default in the metric that chooses the best weights (points of top-1 accuracy). A metric that is no
mean over images, such as ece, is compared over seeds alone. Equal seeds are paired: their runs share the order of images, crops, mixup
draws and initial convolutions; pairing is used when it lowers the variance, which is measured. Runs that were evaluated
in unlike ways (resolution, statistics, last or best epoch, dtype ...) are refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("pair", nargs="*", type=Path, metavar="RUN", help="two run folders")
    add("--a", nargs="+", type=Path, default=[], metavar="RUN", help="the runs of one method")
    add("--b", nargs="+", type=Path, default=[], metavar="RUN", help="the runs of the other")
    add("--metric", metavar="NAME", help="what to compare by (default: what chooses the best weights)")
    return found


def main(argv: list[str]) -> int:
    """Print the comparison; the exit status is 2 for what the user can mend."""
    asked = parser().parse_args(argv)

    from anorm.processes.errors import user_errors

    with user_errors() as outcome:
        both = bool(asked.a and asked.b)
        if (len(asked.pair) != 2 if asked.pair else not both) or (asked.pair and (asked.a or asked.b)):
            raise ValueError("give two run folders, or --a RUN... --b RUN...")
        a, b = (asked.pair[:1], asked.pair[1:]) if asked.pair else (asked.a, asked.b)

        from anorm.study.compare import report
        from anorm.study.records import open_run

        print(report([open_run(f) for f in a], [open_run(f) for f in b], asked.metric))
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
