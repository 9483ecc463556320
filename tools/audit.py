"""Check the sizes that the papers print against the networks themselves.

    python tools/audit.py [table1|table2|table3|v1_table1|all]     every row: printed and true #Params and FLOPs, a verdict
    python tools/audit.py table2 --faithful code                   the networks of the authors' code where they differ
    python tools/audit.py all --csv sizes.csv --markdown sizes.md  also into files

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
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch
from tables import FAITHFUL, Counted, Row, Table, load, names
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from anorm.algebra import Moments
from anorm.engine.compose import compose
from anorm.norms.base import Norm, Site
from anorm.norms.placement import Placement
from anorm.options import accepted
from anorm.registry import create_model

UNITS = {"M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Size:
    """A network's size by every convention: all and leaf parameters; macs and thop for one image."""

    all: int
    leaf: int
    macs: int
    thop: int


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


def size_of(arguments: Iterable[str], classes: int = 1000, pixels: int = 224) -> Size:
    """The size of the network that train.py builds for these arguments, on images of pixels x pixels."""
    return _size(*_composed(tuple(arguments)), classes, pixels)


@cache
def _composed(arguments: tuple[str, ...]) -> tuple[str, str]:
    config = compose(ROOT / "configs", list(arguments), accepted).config
    return json.dumps(config["arch"], sort_keys=True), json.dumps(config["norm"], sort_keys=True)


@cache
def _size(arch_config: str, norm_config: str, classes: int, pixels: int) -> Size:
    arch, place = json.loads(arch_config), Placement(**json.loads(norm_config))
    laws: list[LawOnly] = []

    def norm(site: Site) -> LawOnly:
        laws.append(LawOnly(place(site)))
        return laws[-1]

    with torch.device("meta"), torch.no_grad():
        model = create_model(arch.pop("name"), norm, num_classes=classes, **arch).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, pixels, pixels))
    macs = counter.get_total_flops() // 2
    leaves = (m for m in model.modules() if not list(m.children()))
    return Size(
        all=sum(p.numel() for p in model.parameters()),
        leaf=sum(p.numel() for m in leaves for p in m.parameters()),
        macs=macs,
        thop=macs + sum((5 if layer.norm.act else 4) * layer.outputs for layer in laws),
    )


class LawOnly(nn.Module):
    """A norm of which only the law runs: the rest is elementwise, no multiply-add by this counting."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.outputs = 0

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, mask: object = None
    ) -> torch.Tensor:
        self.outputs += x.numel()
        moment = x.new_empty(x.shape[:2])
        self.norm.law(Moments(moment, moment, x.shape[2] * x.shape[3]))
        return x

    def zero_init(self) -> None:
        self.norm.zero_init()


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
    """Every row of a table."""
    found = []
    for row in table.rows:
        arguments = row.arguments(faithful)
        size = size_of(arguments)

        def explained(
            said: Counted | None, arguments: list[str] = arguments
        ) -> tuple[Counted, int | None] | None:
            if said is None or said.count is None:
                return None if said is None else (said, None)
            return said, getattr(size_of([*arguments, *said.overrides]), said.count)

        flops = judge(row.flops, size.macs, explained(row.flops_as)) if row.flops else None
        found.append(Audited(row, size, judge(row.params, size.all, explained(row.params_as)), flops))
    return found


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
        lines += [f"### {group}", "", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
        for a in rows:
            if a.row.group == group:
                lines.append(
                    "| " + " | ".join(cell(a).replace("|", "\\|") for cell in COLUMNS.values()) + " |"
                )
        lines.append("")
    lines += [f"* {a.row.label} ({a.row.group}): {a.row.note}" for a in rows if a.row.note]
    lines += [f"* {mark}: {meaning}" for mark, meaning in table.marks.items()]
    return "\n".join(lines).rstrip() + "\n"


def as_csv(audited: dict[str, list[Audited]], faithful: str) -> str:
    """All tables as CSV, one header; sizes as plain numbers."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(
        [
            "table",
            "group",
            "method",
            "faithful",
            "printed_params",
            "params",
            "leaf_params",
            "params_verdict",
            "params_reason",
            "printed_flops",
            "macs",
            "macs_norms_relus",
            "flops_verdict",
            "flops_reason",
            "top1_error",
            "top5_error",
            "command",
        ]
    )
    for name, rows in audited.items():
        for a in rows:
            flops = a.flops or Verdict("")
            write(
                [
                    name,
                    a.row.group,
                    a.row.label,
                    faithful,
                    a.row.params,
                    a.size.all,
                    a.size.leaf,
                    a.params.word,
                    a.params.reason,
                    a.row.flops or "",
                    a.size.macs,
                    a.size.thop,
                    flops.word,
                    flops.reason,
                    a.row.top1,
                    a.row.top5,
                    a.row.command(faithful),
                ]
            )
    return out.getvalue()


def main(argv: list[str]) -> int:
    """Print the Markdown; the exit status is 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", default="all", choices=[*names(), "all"])
    parser.add_argument("--faithful", default="paper", choices=FAITHFUL)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    asked = parser.parse_args(argv)
    tables = [load(name) for name in (names() if asked.table == "all" else [asked.table])]
    audited = {table.name: audit(table, asked.faithful) for table in tables}
    text = "\n".join(markdown(table, audited[table.name], asked.faithful) for table in tables)
    print(text, end="")
    if asked.markdown:
        asked.markdown.write_text(text, encoding="utf-8")
    if asked.csv:
        asked.csv.write_text(as_csv(audited, asked.faithful), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
