"""A tally as text for a terminal, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from functools import partial

from anorm.study import markdown as md
from anorm.study.statistics import USUAL_SD, Interval, words
from anorm.study.tally import Column, Comparison, Entry, Tally
from anorm.tasks import Metric

Cell = Callable[[Entry], str]


def shown(value: Interval | None, metric: Metric) -> str:
    """Return an interval as a table shows it, an accuracy as its error rate: "21.59 ± 0.31", or "-"."""
    if value is None:
        return "-"
    half = f" ± {value.half:.{metric.digits}f}" if value.n > 1 else ""
    return f"{as_shown(value.mean, metric):.{metric.digits}f}{half}"


def as_shown(value: float, metric: Metric) -> float:
    """Return a value as tables and curves show it: an accuracy as its error rate."""
    return 100 - value if metric.as_error else value


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _amount(value: int, digits: int, *units: tuple[float, str]) -> str:
    """Return the amount in the first unit that is not too large for it: a fifth of one still is not."""
    size, unit = next((u for u in units if value >= u[0] / 5), units[-1])
    return f"{value / size:.{digits}f} {unit}"


def columns(tally: Tally) -> dict[str, Cell]:
    """Return heading -> cell of this table's columns: those of a paper, and GPUs, only where there is one."""
    found: dict[str, Cell] = {
        "Method": lambda e: e.line.label,
        "#Params": lambda e: _amount(e.size.all, 2, (1e6, "M"), (1e3, "k")),
        "multiply-adds": lambda e: _amount(e.size.macs, 3, (1e9, "G"), (1e6, "M")),
    }
    of_paper = [column for column in tally.columns if any(_printed(column, e) is not None for e in tally.entries)]
    for column in of_paper:
        found[f"printed {column.heading}"] = partial(_printed_cell, column)
    for column in tally.columns:
        found[f"ours {column.heading}"] = partial(_ours, column)
    found["seeds"] = lambda e: str(len(e.runs)) if e.runs else "-"
    if tally.main in of_paper:
        found["gap"] = partial(_gap, tally.main)
    found["verdict"] = lambda e: e.verdict
    # a speed says something only beside its machine: CSV holds both
    if any(e.line.printed for e in tally.entries) or not any(e.trained and not e.on_gpu for e in tally.entries):
        found["GPU-hours"] = lambda e: _number(e.gpu_hours, ".1f")
    return found


def _printed(column: Column, entry: Entry) -> float | None:
    """Return the paper's number as it is printed."""
    value = column.printed(entry.line)
    return None if value is None else as_shown(value, column.metric)


def _printed_cell(column: Column, entry: Entry) -> str:
    return _number(_printed(column, entry), f".{column.metric.digits}f")


def _ours(column: Column, entry: Entry) -> str:
    return shown(entry.values[column.name], column.metric)


def _gap(column: Column, entry: Entry) -> str:
    """Return ours - printed, of what the columns beside it show."""
    sign = -1 if column.metric.as_error else 1
    return _number(None if entry.gap is None else sign * entry.gap, f"+.{column.metric.digits}f")


def header(tally: Tally) -> str:
    """Return what the numbers are, in words."""
    kinds: dict[str, list[str]] = {}
    for column in tally.columns:
        metric = column.metric
        kind = "error rates in percent" if metric.as_error else "in percent" if metric.unit == "%" else "plain"
        kinds.setdefault(kind, []).append(column.heading)
    if list(kinds) == ["error rates in percent"]:
        said = "error rates in percent"
    else:
        as_ = {"error rates in percent": " as error rates in percent", "in percent": " in percent", "plain": ""}
        said = "; ".join(f"{', '.join(headings)}{as_[kind]}" for kind, headings in kinds.items())
    lower = tally.main.metric.as_error or not tally.main.metric.higher_is_better
    gap = f"; gap = ours - printed, positive is {'worse' if lower else 'better'}" if "gap" in columns(tally) else ""
    return f"{said}, ± the 95 % interval over seeds (t){gap}"


def missing(tally: Tally) -> list[str]:
    """Return the command of every missing cell."""
    return [command for entry in tally.entries for command in commands(entry)]


def commands(entry: Entry) -> list[str]:
    return [entry.line.command(seed) for seed in entry.missing]


def comparison(found: Comparison, tally: Tally) -> str:
    main = tally.main
    labels = found.base.line.label, found.entry.line.label
    return words(found.found, *labels, main.metric, found.p, USUAL_SD.get(main.reading.metric))


def compared(tally: Tally) -> str:
    """Return what the comparisons are in, in words."""
    return tally.main.reading.measured(tally.main.metric)


def text(tally: Tally) -> str:
    """Aligned columns, a block for each group; comparisons; notes; the command of every missing cell."""
    names = columns(tally)
    rows = {entry.line: [cell(entry) for cell in names.values()] for entry in tally.entries}
    widths = [max(len(name), *(len(row[i]) for row in rows.values())) for i, name in enumerate(names)]

    def aligned(cells: list[str]) -> str:
        return "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    lines = [tally.title, f"({header(tally)})"]
    for group in dict.fromkeys(e.line.group for e in tally.entries):
        lines += ["", *([group] if group != tally.grid.title else []), aligned(list(names))]
        lines += [aligned(rows[e.line]) for e in tally.entries if e.line.group == group]
    if tally.comparisons:
        lines += [
            "",
            f"Compared ({compared(tally)}):",
            *(f"  {comparison(c, tally)}" for c in tally.comparisons),
        ]
    lines += [
        "",
        "Notes:",
        *(f"  {note}" for note in tally.notes),
        *(f"  {m}: {meaning}" for m, meaning in tally.grid.marks.items()),
    ]
    if commanded := missing(tally):
        lines += [
            "",
            f"Missing ({len(commanded)} cells; --run runs them):",
            *(f"  {command}" for command in commanded),
        ]
    return "\n".join(lines) + "\n"


def markdown(tally: Tally) -> str:
    names, said = columns(tally), header(tally)
    lines = [f"## {tally.title}", "", f"{said[0].upper()}{said[1:]}."]
    for group in dict.fromkeys(e.line.group for e in tally.entries):
        lines += ["", *([f"### {group}", ""] if group != tally.grid.title else [])]
        entries = [e for e in tally.entries if e.line.group == group]
        lines += md.table(list(names), ([cell(e) for cell in names.values()] for e in entries))
    if tally.comparisons:
        lines += ["", f"Compared, in {compared(tally)}:", ""]
        lines += [f"* {comparison(c, tally)}" for c in tally.comparisons]
    lines += [
        "",
        *(f"* {note}" for note in tally.notes),
        *(f"* {m}: {meaning}" for m, meaning in tally.grid.marks.items()),
    ]
    if commanded := missing(tally):
        lines += ["", f"Missing ({len(commanded)} cells):", "", *(f"    {command}" for command in commanded)]
    return "\n".join(lines) + "\n"


ESCAPES = {
    "\\": r"\textbackslash{}",
    "†": r"$\dagger$",
    "±": r"$\pm$",
    "*": r"$*$",
    "<": r"$<$",
    ">": r"$>$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: "\\" + c for c in "&%$#_{}"},
}


def tex(words: str) -> str:
    """Text with what LaTeX reads as commands escaped."""
    return "".join(ESCAPES.get(c, c) for c in words)


def latex(tally: Tally) -> str:
    """Return a table environment that needs no package."""
    names = columns(tally)
    heads = dict(zip(names, map(tex, names), strict=True))
    for column in tally.columns:
        for whose in ("printed", "ours"):
            if column.metric.latex and f"{whose} {column.heading}" in heads:
                heads[f"{whose} {column.heading}"] = f"{whose} {column.reading.heading(column.metric, latex=True)}"
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{tex(tally.title)}: {tex(header(tally))}.}}",
        rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}",
        r"\hline",
        " & ".join(heads.values()) + r" \\",
    ]
    for group in dict.fromkeys(e.line.group for e in tally.entries):
        lines += [r"\hline", rf"\multicolumn{{{len(names)}}}{{c}}{{{tex(group)}}} \\", r"\hline"]
        lines += [
            " & ".join(tex(cell(e)) for cell in names.values()) + r" \\"
            for e in tally.entries
            if e.line.group == group
        ]
    lines += [r"\hline", r"\end{tabular}", r"\end{table}", *(f"% {note}" for note in tally.notes)]
    return "\n".join(lines) + "\n"


def as_csv(tally: Tally) -> str:
    """Return one line a row, plain numbers, accuracies as error rates in percent; empty where there is nothing."""
    out, cells = io.StringIO(), csv_columns(tally)
    write = csv.writer(out, lineterminator="\n").writerow
    write(cells)
    for e in tally.entries:
        write([cell(e) for cell in cells.values()])
    return out.getvalue()


def csv_columns(tally: Tally) -> dict[str, Callable[[Entry], object]]:
    """Return name -> cell. A metric's column has the name that --metric takes."""
    best = {selection.name: selection.best for selection in tally.selections}

    def selected(e: Entry) -> str:
        return "" if best.get(e.line.tuned) is None else "yes" if best[e.line.tuned] is e else "no"

    found: dict[str, Callable[[Entry], object]] = {
        "table": lambda e: tally.grid.name,
        "group": lambda e: e.line.group,
        "method": lambda e: e.line.label,
        "faithful": lambda e: tally.faithful,
        "params": lambda e: e.size.all,
        "macs": lambda e: e.size.macs,
    }
    for column in tally.columns:
        found[f"printed_{column.name}"] = lambda e, c=column: e.line.printed.values.get(c.name, "") if e.line.printed else ""
    for column in tally.columns:
        found[column.name] = lambda e, c=column: _exactly(c, e.values[c.name], "mean")
        if column is tally.main:
            low, high = ("high", "low") if column.metric.as_error else ("low", "high")
            found[f"{column.name}_low"] = lambda e, c=column, end=low: _exactly(c, e.values[c.name], end)
            found[f"{column.name}_high"] = lambda e, c=column, end=high: _exactly(c, e.values[c.name], end)
    sign = -1 if tally.main.metric.as_error else 1
    return found | {
        "seeds": lambda e: " ".join(map(str, e.runs)),
        "gap": lambda e: "" if e.gap is None else f"{sign * e.gap:.4f}",
        "verdict": lambda e: e.verdict,
        "images_per_second": lambda e: "" if e.images_per_second is None else f"{e.images_per_second:.2f}",
        "machine": lambda e: e.machines,
        "gpu_hours": lambda e: "" if e.gpu_hours is None else f"{e.gpu_hours:.3f}",
        "protocol": lambda e: str(tally.stamp or ""),
        "missing": lambda e: "; ".join(commands(e)),
        "selected": selected,
    }


def _exactly(column: Column, value: Interval | None, end: str) -> str:
    """Return an end of an interval, or its mean, with four digits; an end only over several seeds."""
    if value is None or (end != "mean" and value.n < 2):
        return ""
    return f"{as_shown(getattr(value, end), column.metric):.{max(4, column.metric.digits)}f}"


FORMATS: dict[str, Callable[[Tally], str]] = {
    "terminal": text,
    "markdown": markdown,
    "latex": latex,
    "csv": as_csv,
}
