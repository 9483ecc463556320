"""Write the generated tables of README.md: norms and architectures, from the code itself.

    python scripts/readme.py           write them
    python scripts/readme.py --check   exit 1 if they are out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import anorm
from anorm.norms.build import norm_classes

README = Path(__file__).resolve().parents[1] / "README.md"
SHOWN = "bn", "an"


def norms() -> str:
    rows = ["| norm | equation | from |", "| --- | --- | --- |"]
    for name, cls in sorted(norm_classes().items()):
        module = sys.modules[cls.__module__]
        path = cls.__module__.replace(".", "/")
        title = _first_line(module).split(":")[0]
        rows.append(f"| `{name}` | {_first_line(cls)} | [{title}]({path}.py) |")
    return "\n".join(rows)


def _first_line(documented: object) -> str:
    return documented.__doc__.strip().splitlines()[0].rstrip(".").replace("``", "`").replace("|", "/")


def archs() -> str:
    rows = ["| arch | " + " | ".join(f"parameters, {n}" for n in SHOWN) + " |", "| --- |" + " ---: |" * len(SHOWN)]
    for name in anorm.list_archs():
        counts = []
        for norm in SHOWN:
            with torch.device("meta"):
                model = anorm.create_model(name, norm)
            counts.append(f"{sum(p.numel() for p in model.parameters()):,}")
        rows.append(f"| `{name}` | " + " | ".join(counts) + " |")
    return "\n".join(rows)


SECTIONS: dict[str, Callable[[], str]] = {"norms": norms, "archs": archs}


def filled(text: str) -> str:
    """README's text with each part between <!-- name --> and <!-- /name --> made anew."""
    for name, make in SECTIONS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        body = make()
        text, found = re.subn(pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.S)
        assert found == 1, f"README.md needs exactly one pair of <!-- {name} --> markers"
    return text


def main(arguments: list[str]) -> int:
    old = README.read_text()
    new = filled(old)
    if arguments == ["--check"]:
        if new != old:
            print("README.md is out of date: run python scripts/readme.py")
        return int(new != old)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
