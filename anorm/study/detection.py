"""The papers' tables of detection (``configs/table/detection/*.yaml``): their rows, and an audit of their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from anorm.build import create_task
from anorm.config.frozen import Config
from anorm.study.audit import Verdict, judge
from anorm.study.printed import CONFIGS, TABLES, Counted

__all__ = ["DetectionRow", "DetectionTable", "audit", "load", "markdown", "names", "size_of"]

FOLDER = TABLES / "detection"
COCO_CLASSES = 80


@dataclass(frozen=True)
class DetectionRow:
    """One row as printed: norm of the backbone and of the head, #Params (None: not printed), and ``numbers`` of the table
    in percent (None: not printed). why: what is known where the size is not the network's.
    """

    label: str
    backbone: str
    head: str
    params: str | None
    printed: tuple[float | None, ...]
    overrides: tuple[str, ...]
    mark: str = ""
    note: str = ""
    why: str = ""

    def command(self) -> str:
        """The command that trains it."""
        return " ".join(("python train.py", *self.overrides, "data.root=COCO", "weights=CLASSIFIER"))


@dataclass(frozen=True)
class DetectionTable:
    """A table: where it is printed, what its numbers are called, its rows in order."""

    name: str
    title: str
    source: str
    section: str
    numbers: tuple[str, ...]
    rows: tuple[DetectionRow, ...]
    page: int | None = None
    marks: tuple[tuple[str, str], ...] = ()


def names(folder: Path = FOLDER) -> list[str]:
    """The tables that exist."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load(name: str, folder: Path = FOLDER) -> DetectionTable:
    """A table by name. Raises ValueError for a key that a row does not have, or numbers that are too many or few."""
    path = folder / f"{name}.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    shared, rows = tuple(data.pop("overrides")), data.pop("rows")
    marks = tuple(data.pop("marks", {}).items())
    numbers = tuple(data.pop("numbers"))
    try:
        made = tuple(
            DetectionRow(
                **row | {"printed": tuple(row["printed"]), "overrides": (*shared, *row["overrides"])}
            )
            for row in rows
        )
        table = DetectionTable(name=name, rows=made, numbers=numbers, marks=marks, **data)
    except (TypeError, KeyError) as error:  # dataclasses name the key
        raise ValueError(f"{path}: {error}") from error
    for row in table.rows:
        if len(row.printed) != len(numbers):
            raise ValueError(f"{path}: {row.label} has {len(row.printed)} numbers of {len(numbers)}")
    return table


def size_of(row: DetectionRow) -> int:
    """Parameters of the row's detector with COCO's 80 classes; no memory is taken."""
    config = Config.compose(CONFIGS, list(row.overrides))
    arch = config.arch.tree()
    with torch.device("meta"):
        task = create_task(config, [f"class {i}" for i in range(COCO_CLASSES)])
        model = task.create(arch.pop("name"), config.norm.tree(), **arch)
    return sum(parameter.numel() for parameter in model.parameters())


def audit(table: DetectionTable) -> list[tuple[DetectionRow, int, Verdict | None]]:
    """Each row with its true size and the verdict on the printed one, None where none is printed."""
    found = []
    for row in table.rows:
        true = size_of(row)
        said = (Counted(row.why), None) if row.why else None
        found.append((row, true, judge(row.params, true, said) if row.params else None))
    return found


def markdown(table: DetectionTable, rows: list[tuple[DetectionRow, int, Verdict | None]]) -> str:
    """The table as Markdown: sizes, verdicts, the printed numbers, and the command of each row."""
    where = ", ".join((f"section {table.section}", *([f"page {table.page}"] if table.page else [])))
    heads = ["", "Backbone", "Head", "printed #Params", "true #Params", "verdict", *table.numbers, "command"]
    lines = [
        f"## {table.name}: {table.title}",
        "",
        f"{table.source}, {where}. Numbers as printed, in percent.",
        "",
    ]
    lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row, true, verdict in rows:
        cells = [row.mark + row.label, row.backbone, row.head, row.params or "-", f"{true:,}"]
        cells += ["-" if verdict is None else str(verdict)]
        cells += ["-" if number is None else f"{number:.1f}" for number in row.printed]
        lines.append("| " + " | ".join([*cells, f"`{row.command()}`"]) + " |")
    lines += ["", *(f"* {row.label}: {row.note}" for row, _, _ in rows if row.note)]
    lines += [f"* {mark}: {meaning}" for mark, meaning in table.marks]
    return "\n".join(lines).rstrip() + "\n"
