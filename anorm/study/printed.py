"""The papers' tables as data: ``configs/table/*.yaml`` read into rows, for the tools over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

__all__ = ["FAITHFUL", "TABLES", "Counted", "Row", "Table", "load", "names"]

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TABLES = CONFIGS / "table"
FAITHFUL = ("paper", "code")


@dataclass(frozen=True)
class Counted:
    """What explains a printed number that is not the true one.

    count: "all" (every parameter), "leaf" (parameters of modules without children), "macs" (multiply-adds of
    convolutions and linear layers), "thop" (those and norms and ReLUs); None where no convention is known.
    overrides: of the model that was counted, on top of the row's.
    """

    why: str
    count: str | None = None
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.count not in (None, "all", "leaf", "macs", "thop"):
            raise ValueError(f"count: {self.count!r} is none of all, leaf, macs, thop")


@dataclass(frozen=True)
class Row:
    """One row as printed: ``params`` such as "25.76M", ``flops`` such as "4.09G" (None: a dash).

    values: the printed numbers by the table's metrics, of an accuracy its error rate in percent; gaps: the printed
    distances to the table's best, where there are any. overrides: the arguments of train.py, the group's included; code:
    what faithful=code changes beyond the recipe. mark: the printed sign.
    """

    label: str
    group: str
    values: dict[str, float] = field(hash=False)
    params: str | None = None
    flops: str | None = None
    overrides: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    gaps: dict[str, float] = field(default_factory=dict, hash=False)
    mark: str = ""
    note: str = ""
    params_as: Counted | None = None
    flops_as: Counted | None = None

    def arguments(self, faithful: str = "paper") -> list[str]:
        """The arguments of train.py for this row, after the paper's text or after the authors' code."""
        if faithful not in FAITHFUL:
            raise ValueError(f"faithful={faithful!r} is neither paper nor code")
        changed = ("faithful=code", *self.code) if faithful == "code" else ()
        keys = {word.partition("=")[0] for word in changed}
        return [*(word for word in self.overrides if word.partition("=")[0] not in keys), *changed]

    def command(self, faithful: str = "paper") -> str:
        quoted = (f"'{a}'" if any(c in a for c in "[](){},* ") else a for a in self.arguments(faithful))
        return " ".join(("python train.py", *quoted))


@dataclass(frozen=True)
class Table:
    """A table: where it is printed, its rows in order, and what differs between the paper and the authors'
    code (``differences``: what, paper, code, and the key of train.py that selects, where there is one).

    metrics: the printed columns, METRIC or METRIC@SET/STATISTICS (``records.Reading``); the first is the one that
    rows are compared by.
    """

    name: str
    title: str
    source: str
    section: str
    metrics: tuple[str, ...]
    page: int | None = None
    marks: dict[str, str] = field(default_factory=dict)
    differences: tuple[dict[str, str], ...] = ()
    rows: tuple[Row, ...] = ()


def names(folder: Path = TABLES) -> list[str]:
    """The tables that exist, a row a run (``anorm.study.generalization`` reads the others)."""
    return sorted(path.stem for path in folder.glob("*.yaml") if "\ngroups:" in path.read_text(encoding="utf-8"))


def load(name: str, folder: Path = TABLES) -> Table:
    """A table by name. Raises ValueError for an unknown name, or for a key that no row has."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no table {name!r}; there are {', '.join(names(folder))}")
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    groups, metrics = data.pop("groups"), tuple(data.pop("metrics"))
    try:
        rows = tuple(_row(entry, group, metrics) for group in groups for entry in group["rows"])
        data["differences"] = tuple(data.get("differences", ()))
        return Table(name=name, rows=rows, metrics=metrics, **data)
    except TypeError as error:  # dataclasses name the key
        raise ValueError(f"{path}: {error}") from error


def _row(entry: dict, group: dict, metrics: tuple[str, ...]) -> Row:
    entry = dict(entry)
    entry["values"] = {name: entry.pop(name) for name in metrics if name in entry}
    entry["gaps"] = {name: entry.pop(f"gap_{name}") for name in metrics if f"gap_{name}" in entry}
    entry["overrides"] = (*group["overrides"], *entry.get("overrides", ()))
    entry["code"] = tuple(entry.get("code", ()))
    for key in ("params_as", "flops_as"):
        if key in entry:
            counted = dict(entry[key])
            entry[key] = Counted(**counted | {"overrides": tuple(counted.get("overrides", ()))})
    return Row(group=group["title"], **entry)
