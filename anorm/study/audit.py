"""The audit of printed sizes: each row of a table beside its network's true size, with a verdict on both numbers.

True parameters: every trainable number. True FLOPs: multiply-adds of convolutions and linear layers for one
image of 224 x 224 (torch's FlopCounterMode / 2). The verdicts are in the help of tools/audit.py.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache

from anorm.config.frozen import Config
from anorm.study import markdown as md
from anorm.study.printed import CONFIGS, FAITHFUL, Counted, Row, Table
from anorm.study.sizes import Size, size_of

UNITS = {"M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Verdict:
    word: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}" if self.reason else self.word


@dataclass(frozen=True)
class Audited:
    """A row with its network's true size and both verdicts."""

    row: Row
    size: Size
    params: Verdict
    flops: Verdict | None


def judge(printed: str, true: int, explanation: tuple[Counted, int | None] | None) -> Verdict:
    """The verdict on a printed number such as "25.76M".

    explanation: what the table says about it, and the number which that way of counting gives here, if it is
    one.
    Raises ValueError where that is not the printed number after all: then the table's explanation is wrong.
    """
    if (distance := _digits_off(printed, true)) == 0:
        return Verdict("equal")
    if explanation is None:
        return Verdict(
            "rounding" if distance == 1 else "misprint", "" if distance == 1 else "no explanation is known"
        )
    said, number = explanation
    flops = printed.endswith("G")
    word = "convention" if flops and (said.count in (None, "thop")) and not said.overrides else "misprint"
    if number is None:
        return Verdict(word, said.why)
    if _digits_off(printed, number) > (1 if said.count == "thop" else 0):
        raise ValueError(f"{printed} was to be explained ({said.why}), but that gives {number:,}")
    return Verdict(word, f"{said.why}: {_amount(number, printed[-1])}")


def _digits_off(printed: str, number: int) -> int:
    """How far the number, rounded like the printed one, is from it, in units of the last printed digit."""
    digits = Decimal(printed[:-1])
    unit = Decimal(1).scaleb(digits.as_tuple().exponent)
    rounded = (Decimal(number) / UNITS[printed[-1]]).quantize(unit)
    return int(abs(rounded - digits) / unit)


def _amount(number: int, unit: str) -> str:
    return f"{number / UNITS[unit]:.3f} {unit}"


def audit(table: Table, faithful: str = "paper") -> list[Audited]:
    """Return every row of a table, with the verdicts on its two numbers."""
    found = []
    for row in table.rows:
        size = size_of(_config(tuple(row.arguments(faithful))))
        params = judge(row.params, size.all, _explained(row, row.params_as, faithful))
        flops = judge(row.flops, size.macs, _explained(row, row.flops_as, faithful)) if row.flops else None
        found.append(Audited(row, size, params, flops))
    return found


def networks(table: Table) -> list[Config]:
    """Return the configurations of all networks that an audit of the table counts."""
    found = []
    for faithful in FAITHFUL:
        for row in table.rows:
            counted = [said.overrides for said in (row.params_as, row.flops_as) if said and said.count]
            found += [_config((*row.arguments(faithful), *overrides)) for overrides in [(), *counted]]
    return found


def _explained(row: Row, said: Counted | None, faithful: str) -> tuple[Counted, int | None] | None:
    """Return what the table says about a printed number, and the number which that way of counting gives."""
    if said is None or said.count is None:
        return None if said is None else (said, None)
    return said, getattr(size_of(_config((*row.arguments(faithful), *said.overrides))), said.count)


@cache
def _config(arguments: tuple[str, ...]) -> Config:
    return Config.compose(CONFIGS, list(arguments))


COLUMNS: dict[str, Callable[[Audited], str]] = {
    "Method": lambda a: a.row.label,
    "printed #Params": lambda a: a.row.params,
    "true #Params": lambda a: f"{a.size.all:,}",
    "leaf-only": lambda a: f"{a.size.leaf:,}",
    "verdict (#Params)": lambda a: str(a.params),
    "printed FLOPs": lambda a: a.row.flops or "-",
    "true FLOPs": lambda a: _amount(a.size.macs, "G"),
    "with norms and ReLUs": lambda a: _amount(a.size.thop, "G"),
    "verdict (FLOPs)": lambda a: str(a.flops) if a.flops else "-",
}


def markdown(table: Table, rows: list[Audited], faithful: str) -> str:
    """The table as Markdown, a heading for each group, notes below."""
    where = ", ".join((f"section {table.section}", *([f"page {table.page}"] if table.page else [])))
    lines = [
        f"## {table.name}: {table.title}",
        "",
        f"{table.source}, {where}. Networks after the {faithful}.",
        "",
    ]
    for group in dict.fromkeys(a.row.group for a in rows):
        cells = ([cell(a) for cell in COLUMNS.values()] for a in rows if a.row.group == group)
        lines += [f"### {group}", "", *md.table(list(COLUMNS), cells, words=len(COLUMNS)), ""]
    lines += [f"* {a.row.label} ({a.row.group}): {a.row.note}" for a in rows if a.row.note]
    lines += [f"* {mark}: {meaning}" for mark, meaning in table.marks.items()]
    return "\n".join(lines).rstrip() + "\n"


CSV: dict[str, Callable[[str, str, Audited], object]] = {
    "table": lambda table, faithful, a: table,
    "group": lambda table, faithful, a: a.row.group,
    "method": lambda table, faithful, a: a.row.label,
    "faithful": lambda table, faithful, a: faithful,
    "printed_params": lambda table, faithful, a: a.row.params,
    "params": lambda table, faithful, a: a.size.all,
    "leaf_params": lambda table, faithful, a: a.size.leaf,
    "params_verdict": lambda table, faithful, a: a.params.word,
    "params_reason": lambda table, faithful, a: a.params.reason,
    "printed_flops": lambda table, faithful, a: a.row.flops or "",
    "macs": lambda table, faithful, a: a.size.macs,
    "macs_norms_relus": lambda table, faithful, a: a.size.thop,
    "flops_verdict": lambda table, faithful, a: a.flops.word if a.flops else "",
    "flops_reason": lambda table, faithful, a: a.flops.reason if a.flops else "",
    "top1_error": lambda table, faithful, a: a.row.values.get("top1", ""),
    "top5_error": lambda table, faithful, a: a.row.values.get("top5", ""),
    "command": lambda table, faithful, a: a.row.command(faithful),
}


def as_csv(audited: dict[str, list[Audited]], faithful: str) -> str:
    """Return all tables as CSV, one header; sizes as plain numbers."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(CSV)
    for name, rows in audited.items():
        for a in rows:
            write([cell(name, faithful, a) for cell in CSV.values()])
    return out.getvalue()
