"""Grids of runs: the rows of a paper's table or the combinations of a yaml's axes, their cells, and what has been run of them.

A yaml of ``configs/grid`` (or any file):

    title: "K and where AN stands"
    overrides: [arch=resnet50, setup=vanilla]          of every cell
    axes:                                              rows are all combinations, the last axis fastest
      norm: [bn, an]                                   the first value of the first axis is the baseline of comparisons
      norm.k: {when: norm=an, values: [5, 10, 20]}     an axis can hold for some choices only
      optim.lr: [0.05, 0.1, 0.2]                       every norm must be given as many learning rates
    seeds: 3
    metrics: [top1, mean_class_accuracy]               columns, METRIC or METRIC@SET/STATISTICS; the first decides

An axis can also be a list of {when: ..., values: [...]}, of which the first that holds counts: other learning
rates for each norm, as many of them. With an axis optim.lr the best rate of each norm is selected, and those
are compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from anorm.config.frozen import Config
from anorm.config.signature import EXCLUDED
from anorm.engine.runfolder import folder_for
from anorm.study.printed import CONFIGS, Row, Table, load, names
from anorm.study.records import likeness

RATE = "optim.lr"


@dataclass(frozen=True)
class Line:
    """A row to be filled. overrides: train.py's arguments but for the seed; printed: the paper's row, where there is one;
    versus: the label of the line that it is compared with.

    Of a grid with an axis of learning rates: rate; tuned and tuned_versus, label and versus without it.
    """

    label: str
    group: str
    overrides: tuple[str, ...]
    printed: Row | None = None
    versus: str | None = None
    rate: float | None = None
    tuned: str | None = None
    tuned_versus: str | None = None

    @cached_property
    def config(self) -> Config:
        """The configuration, seed 0."""
        return Config.compose(CONFIGS, list(self.overrides))

    @cached_property
    def likeness(self) -> str:
        return likeness(self.config)

    def arguments(self, seed: int) -> list[str]:
        return [*self.overrides, f"seed={seed}"]

    def command(self, seed: int) -> str:
        quoted = (f"'{a}'" if any(c in a for c in "[](){},* $&;|<>") else a for a in self.arguments(seed))
        return " ".join(("python train.py", *quoted))

    def folder(self, seed: int, signature: str) -> Path:
        """Where train.py puts this run."""
        return folder_for(self.config.having(seed=seed), signature)


@dataclass(frozen=True)
class Grid:
    """Lines in order. comparable: cells follow the paper's protocol, so that its numbers may stand beside them."""

    name: str
    title: str
    lines: tuple[Line, ...]
    seeds: int = 3
    comparable: bool = True
    notes: tuple[str, ...] = ()
    marks: dict[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()  # the columns; none: those that the task shows


def open_grid(
    name: str, faithful: str = "paper", scale: str | None = None, extra: tuple[str, ...] = ()
) -> Grid:
    """A paper's table, a grid of configs/grid, or a yaml file. extra: arguments of train.py for every cell.

    Raises ValueError, in words, for what does not exist or does not compose.
    """
    if name in names():
        grid = _paper(load(name), faithful, extra)
    elif (path := CONFIGS / "grid" / f"{name}.yaml").is_file() or (path := Path(name)).is_file():
        grid = _own(path, extra)
    else:
        own = sorted(p.stem for p in (CONFIGS / "grid").glob("*.yaml"))
        raise ValueError(
            f"no table {name!r}: there are {', '.join([*names(), *own])}; or give a yaml file"
        )
    return _scaled(grid, scale) if scale else grid


def _paper(table: Table, faithful: str, extra: tuple[str, ...]) -> Grid:
    lines = []
    for row in table.rows:
        arguments = (*row.arguments(faithful), *extra)
        lines.append(Line(row.label, row.group, arguments, row, _baseline(row, table.rows)))
    where = f"{table.source}, section {table.section}" + (f", page {table.page}" if table.page else "")
    notes = [f"{where}; networks and recipe after the {faithful} (--faithful)"]
    notes += [f"paper and code differ in {d['what']}: {d['paper']} / {d['code']}" for d in table.differences]
    notes += [f"{row.label} ({row.group}): {row.note}" for row in table.rows if row.note]
    changed = _changes_protocol(extra)
    if changed:
        notes.insert(0, f"not the paper's protocol: {' '.join(changed)}")
    return Grid(
        table.name,
        table.title,
        tuple(lines),
        comparable=not changed,
        notes=tuple(notes),
        marks=table.marks,
        metrics=table.metrics,
    )


def _baseline(row: Row, rows: tuple[Row, ...]) -> str | None:
    """The BN row of the same network in the same group."""
    arch = next((o for o in row.overrides if o.startswith("arch=")), None)
    for other in rows:
        if other is not row and other.group == row.group and {arch, "norm=bn"} <= set(other.overrides):
            return other.label
    return None


def _changes_protocol(arguments: tuple[str, ...]) -> list[str]:
    """Those arguments that change what is computed, and not only where."""
    where = (*EXCLUDED, "hardware", "data.root", "data.loader")
    return [
        a
        for a in arguments
        if not any((key := a.split("=")[0]) == w or key.startswith(w + ".") for w in where)
        and not a.startswith("data=imagenet")
    ]


def _own(path: Path, extra: tuple[str, ...]) -> Grid:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {"title", "overrides", "axes", "seeds", "notes", "metrics"}
    if not isinstance(data, dict) or not {"title", "axes"} <= set(data) <= known:
        raise ValueError(f"{path}: a grid has {', '.join(sorted(known))}, of which title and axes are needed")
    axes = {key: _cases(path, key, axis) for key, axis in data["axes"].items()}
    if twice := [a for a in (*data.get("overrides", ()), *extra) if a.split("=")[0].lstrip("+") in axes]:
        raise ValueError(
            f"{twice[0]}: {twice[0].split('=')[0]} is an axis of {path.name} already: leave it "
            "out, or change the axis"
        )
    first, lines = next(iter(axes)), []
    baseline = axes[first][0]["values"][0]
    for choice in combinations(axes):
        others = {key: value for key, value in choice.items() if key != first and "when" not in axes[key][0]}
        compared = None if choice[first] == baseline else {first: baseline} | others
        overrides = (
            *data.get("overrides", ()),
            *(f"{key}={literal(value)}" for key, value in choice.items()),
            *extra,
        )
        line = Line(_words(choice), data["title"], overrides, versus=compared and _words(compared))
        if RATE in axes:
            versus = compared and _words(compared, RATE)
            line = replace(line, rate=choice.get(RATE), tuned=_words(choice, RATE), tuned_versus=versus)
        lines.append(line)
    _check_budget(path, lines)
    labels = {line.label for line in lines}
    lines = [line if line.versus in labels else replace(line, versus=None) for line in lines]
    return Grid(
        path.stem,
        data["title"],
        tuple(lines),
        data.get("seeds", 3),
        False,
        notes=tuple(data.get("notes", ())),
        metrics=tuple(data.get("metrics", ())),
    )


def _cases(path: Path, key: str, axis: Any) -> list[dict]:
    """An axis as a list of {when, values}."""
    several = isinstance(axis, list) and any(isinstance(case, dict) and "values" in case for case in axis)
    cases = [case if isinstance(case, dict) else {"values": case} for case in (axis if several else [axis])]
    for case in cases:
        values = case.get("values")
        if not set(case) <= {"values", "when"} or not isinstance(values, list) or not values:
            raise ValueError(
                f"{path}: axis {key} is a list of values, or {{when: norm=an, values: [...]}}, "
                "or a list of these"
            )
    return cases


def _check_budget(path: Path, lines: list[Line]) -> None:
    """Raises ValueError where one norm is given more learning rates to choose from than another."""
    tried: dict[str | None, set] = {}
    for line in lines:
        tried.setdefault(line.tuned, set()).add(line.rate)
    most, fewest = (pick(tried, key=lambda name: len(tried[name])) for pick in (max, min))
    if len(tried[most]) > len(tried[fewest]):
        raise ValueError(
            f"{path}: {most} is given {len(tried[most])} learning rates and {fewest} "
            f"{len(tried[fewest])}: the best of more is better by luck alone. Give all as many, "
            f"by {RATE} without when, or by a list for each norm: "
            f"{RATE}: [{{when: norm=bn, values: [...]}}, ...]"
        )


def combinations(axes: dict[str, list[dict]]) -> Iterator[dict[str, Any]]:
    """Every choice of values. Of each axis counts the first case whose ``when`` ("norm=an", or
    "norm=an optim.lr=0.1") holds; an axis without such a case is left out."""
    found: list[dict[str, Any]] = [{}]
    for key, cases in axes.items():
        grown = []
        for choice in found:
            facts = {f"{k}={literal(v)}" for k, v in choice.items()}
            case = next((c for c in cases if facts.issuperset(str(c.get("when", "")).split())), None)
            grown += [choice | {key: value} for value in case["values"]] if case else [choice]
        found = grown
    return iter(found)


def literal(value: Any) -> str:
    """A yaml value as train.py's command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _words(choice: dict[str, Any], without: str = "") -> str:
    return ", ".join(_shown(key, value) for key, value in choice.items() if key != without)


def _shown(key: str, value: Any) -> str:
    return str(value) if key in ("norm", "arch", "setup", "data") else f"{key}={literal(value)}"


def _scaled(grid: Grid, scale: str) -> Grid:
    path = CONFIGS / "scale" / f"{scale}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (CONFIGS / "scale").glob("*.yaml")))
        raise ValueError(f"no scale {scale!r}: there is {known}")
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    lines = tuple(replace(line, overrides=(*line.overrides, *data["overrides"])) for line in grid.lines)
    notes = (f"{scale} protocol, not the paper's: {data['what']}", *grid.notes)
    return replace(grid, lines=lines, comparable=False, notes=notes)


def select(grid: Grid, only: str) -> Grid:
    """The lines whose label, group or arguments hold one of the words (comma-separated). Raises ValueError for none."""
    wanted = [word for word in only.lower().split(",") if word]
    lines = tuple(
        line
        for line in grid.lines
        if any(word in f"{line.label} {line.group} {' '.join(line.overrides)}".lower() for word in wanted)
    )
    if not lines:
        raise ValueError(
            f"--only {only}: no row of {grid.name} has it; rows: {', '.join(line.label for line in grid.lines)}"
        )
    return replace(grid, lines=lines)
