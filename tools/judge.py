"""Compare two norms from what their runs stored: which is better, by how much, and how sure one can be.

    python tools/judge.py RUN_BN RUN_AN                           one pair of runs
    python tools/judge.py --a runs/*-bn-* --b runs/*-an-*         two methods, several seeds of each

b - a is printed, in points of top-1 accuracy. Equal seeds are paired: their runs share the order of images, crops, mixup
draws and initial convolutions; pairing is used when it lowers the variance, which is measured. Runs that were evaluated
in unlike ways (resolution, statistics, last or best epoch, dtype ...) are refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from anorm.processes.errors import user_errors


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

        from anorm.study.compare import report
        from anorm.study.records import open_run

        print(report([open_run(f) for f in a], [open_run(f) for f in b]))
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
