"""Look inside a run: what its norms decide, what its units answer, and what the decisions are worth.

    python tools/look_inside.py RUN                             pictures, numbers and a page in RUN/inside
    python tools/look_inside.py RUN RUN2                        another norm beside it, such as BN
    python tools/look_inside.py RUN --classes "school bus,7"    classes by name or number
    python tools/look_inside.py RUN --steps 200                 also the loss landscape of the first 200 steps
    python tools/look_inside.py RUN --only curves               the page alone: no data set is needed
    python tools/look_inside.py RUN data.root=... hardware.device=cpu    with other settings

Sections: responses (histograms of filter responses by class), mixtures (AN's weights), gammas (their spread
over instances), shares (SN's importance weights), gates (SE, BIN, the lambdas of AFN), ranks (running
statistics of the processes), landscape (loss and gradient along the step), surgery (each layer's affine
averaged). What does not apply to a run is said in a line.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

NAMES = ("responses", "mixtures", "gammas", "shares", "gates", "ranks", "landscape", "surgery")
DRAWN_BY_THE_PAGE = "curves"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("runs", nargs="+", metavar="RUN [RUN2] [key=value ...]", help="run folders, then settings to change")
    add("--classes", metavar="A,B", help="classes to compare (default: four at even distances)")
    add("--images", type=int, default=1000, metavar="N", help="images measured on, 0 for all (default 1000)")
    add("--each", type=int, default=16, metavar="N", help="images of each chosen class (default 16)")
    add("--steps", type=int, default=0, metavar="N", help="train N steps afresh for the landscape (default none)")
    add("--lengths", metavar="A,B", help="step lengths in units of the gradient (default 0.05,0.1,0.2,0.4)")
    add("--only", metavar="A,B", help="sections (default: all)")
    add("--metric", metavar="NAME", help="whose curve is drawn (default: what chooses the best weights)")
    add("--out", type=Path, metavar="DIR", help="where the files go (default: RUN/inside)")
    return found


def main(argv: list[str]) -> int:
    """0, or 2 for what the user can mend."""
    asked = parser().parse_intermixed_args(argv)

    from anorm.processes.errors import user_errors

    with user_errors() as outcome:
        folders = [Path(word) for word in asked.runs if "=" not in word]
        overrides = [word for word in asked.runs if "=" in word]
        if not 1 <= len(folders) <= 2:
            raise ValueError(f"give one run folder or two, not {len(folders)}")
        wanted = _wanted(asked.only)
        lengths = _lengths(asked.lengths)
        for name, value, least in (
            ("images", asked.images, 0),
            ("each", asked.each, 1),
            ("steps", asked.steps, 0),
        ):
            if value < least:
                raise ValueError(f"--{name} {value} must be at least {least}")

        from anorm.inside.page import html
        from anorm.inside.sections import SECTIONS
        from anorm.inside.subject import open_subject
        from anorm.inside.view import Inspection
        from anorm.study.records import open_run

        run = open_run(folders[0])
        found = []
        if wanted:
            subjects = [open_subject(folder, overrides) for folder in folders]
            try:
                other = subjects[1] if len(subjects) > 1 else None
                asks = asked.classes, asked.images, asked.each, asked.steps, lengths
                view = Inspection(subjects[0], other, *asks)
                for name in wanted:
                    found.append(SECTIONS[name](view))
                    print(
                        f"{found[-1].title}\n" + "".join(f"  {line}\n" for line in found[-1].said),
                        end="",
                        flush=True,
                    )
                layers = view.seen[0]
            finally:
                for subject in subjects:
                    subject.close()
        else:
            layers = {}
        out = asked.out or folders[0] / "inside"
        out.mkdir(parents=True, exist_ok=True)
        for picture in (picture for section in found for picture in section.pictures):
            (out / f"{picture.name}.png").write_bytes(picture.png)
        if found:
            numbers = {
                name: section.numbers for name, section in zip(wanted, found, strict=True) if section.numbers
            }
            (out / "inside.json").write_text(json.dumps(_plain(numbers), indent=1) + "\n", encoding="utf-8")
        (out / "report.html").write_text(html(run, found, layers, asked.metric), encoding="utf-8")
        print(f"{out}: report.html and {sum(len(s.pictures) for s in found)} pictures")
    return outcome.status


def _wanted(only: str | None) -> list[str]:
    if only is None:
        return list(NAMES)
    from anorm.words import nearest

    words = [word.strip() for word in only.split(",")]
    for word in words:
        if word not in (*NAMES, DRAWN_BY_THE_PAGE):
            raise ValueError(
                f"there is no section {word!r}{nearest(word, (*NAMES, DRAWN_BY_THE_PAGE), 'sections')}"
            )
    return [name for name in NAMES if name in words]


def _lengths(text: str | None) -> tuple[float, ...]:
    from anorm.inside.landscape import LENGTHS

    if text is None:
        return LENGTHS
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(math.isfinite(length) and length > 0 for length in found):
        raise ValueError(f"--lengths {text}: give positive numbers, such as 0.05,0.1,0.2")
    return found


def _plain(value):
    """JSON has no NaN and no tuples."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
