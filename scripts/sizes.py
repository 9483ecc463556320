"""Write anorm/study/sizes.json: the sizes of the networks in the papers' tables, so that tables need not count them.

    python scripts/sizes.py           write them
    python scripts/sizes.py --check   exit 1 if they are out of date
"""

from __future__ import annotations

import argparse
import json
import sys


def main(argv: list[str]) -> int:
    """Return 1 where --check finds the file out of date, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    asked = parser.parse_args(argv)

    from anorm.study.audit import networks
    from anorm.study.printed import load, names
    from anorm.study.sizes import KEPT, to_keep

    found = to_keep([config for name in names() for config in networks(load(name))])
    lines = (f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in found["sizes"].items())
    code, sizes = json.dumps(found["code"], indent=1), ",\n".join(lines)
    text = f'{{"code": {code},\n"sizes": {{\n{sizes}\n}}}}\n'
    if asked.check:
        if KEPT.read_text() != text:
            print(f"{KEPT.name} is out of date: run python scripts/sizes.py")
        return int(KEPT.read_text() != text)
    KEPT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
