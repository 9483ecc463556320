"""Write the generated tables of README.md: norms and architectures, from the code itself.

    python scripts/readme.py           write them
    python scripts/readme.py --check   exit 1 if they are out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
SHOWN = "bn", "an"


def norms() -> str:
    """Return the table of norms: name, equation and source, from their docstrings."""
    from anorm.norms.build import norm_classes
    from anorm.study.markdown import table

    rows = []
    for name, cls in sorted(norm_classes().items()):
        module = sys.modules[cls.__module__]
        path = cls.__module__.replace(".", "/")
        title = _first_line(module).split(":")[0]
        rows.append((f"`{name}`", _first_line(cls), f"[{title}]({path}.py)"))
    return "\n".join(table(("norm", "equation", "from"), rows, words=3))


def _first_line(documented: object) -> str:
    return documented.__doc__.strip().splitlines()[0].rstrip(".").replace("``", "`").replace("|", "/")


def archs() -> str:
    """Return the table of architectures with their true numbers of parameters."""
    import torch

    import anorm
    from anorm.study.markdown import table

    rows = []
    for name in anorm.list_archs():
        counts = []
        for norm in SHOWN:
            with torch.device("meta"):
                model = anorm.create_model(name, norm)
            counts.append(f"{sum(p.numel() for p in model.parameters()):,}")
        rows.append((f"`{name}`", *counts))
    return "\n".join(table(("arch", *(f"parameters, {n}" for n in SHOWN)), rows))


SECTIONS: dict[str, Callable[[], str]] = {"norms": norms, "archs": archs}


def filled(text: str) -> str:
    """README's text with each part between <!-- name --> and <!-- /name --> made anew."""
    for name, make in SECTIONS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        body = make()
        text, found = re.subn(pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.S)
        assert found == 1, f"README.md needs exactly one pair of <!-- {name} --> markers"
    return text


def main(argv: list[str]) -> int:
    """Return 1 where --check finds README out of date, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    asked = parser.parse_args(argv)
    old = README.read_text()
    new = filled(old)
    if asked.check:
        if new != old:
            print("README.md is out of date: run python scripts/readme.py")
        return int(new != old)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
