"""Check the sizes that the papers print against the networks themselves.

    python tools/audit.py [table1|table2|table3|v1_table1|all]     every row: printed and true #Params and FLOPs, a verdict
    python tools/audit.py table2 --faithful code                   the networks of the authors' code where they differ
    python tools/audit.py all --csv sizes.csv --markdown sizes.md  also into files
    python tools/audit.py table4|table5|v1_table2|v1_table3|v1_table4|detection_readme     detectors: #Params alone

True parameters: every trainable number. True FLOPs: multiply-adds of convolutions and linear layers for one
image of 224 x 224 (torch's FlopCounterMode / 2). Verdicts, each for parameters and for FLOPs:

    equal        the printed number is the true one, rounded
    rounding     off by one in the last printed digit
    convention   another way of counting gives the printed number (FLOPs), which is named
    misprint     the printed number is not this network's; the reason is given where it is known

No arithmetic runs: shapes only, on torch's meta device.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("table", nargs="?", default="all", help="a table of configs/table, or all (default)")
    add("--faithful", default="paper", choices=("paper", "code"), help="networks where paper and code differ")
    add("--markdown", type=Path, metavar="FILE", help="also write the tables there")
    add("--csv", type=Path, metavar="FILE", help="also write one file of plain numbers")
    return found


def main(argv: list[str]) -> int:
    """Print the Markdown; the exit status is 2 for what the user can mend."""
    asked = parser().parse_args(argv)

    from anorm.processes.errors import user_errors

    with user_errors() as outcome:
        from anorm.study import detection
        from anorm.study.audit import as_csv, audit, markdown
        from anorm.study.printed import load, names

        if asked.table in detection.names():
            table = detection.load(asked.table)
            text = detection.markdown(table, detection.audit(table))
            print(text, end="")
            if asked.markdown:
                asked.markdown.write_text(text, encoding="utf-8")
            return 0
        tables = [load(name) for name in (names() if asked.table == "all" else [asked.table])]
        audited = {table.name: audit(table, asked.faithful) for table in tables}
        text = "\n".join(markdown(table, audited[table.name], asked.faithful) for table in tables)
        print(text, end="")
        if asked.markdown:
            asked.markdown.write_text(text, encoding="utf-8")
        if asked.csv:
            asked.csv.write_text(as_csv(audited, asked.faithful), encoding="utf-8")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
