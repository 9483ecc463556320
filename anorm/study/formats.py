"""A tally as text for a terminal, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from anorm.study.statistics import Interval, words
from anorm.study.tally import Comparison, Entry, Tally


def error(top: Interval | None) -> str:
    """An accuracy interval as an error rate in percent: "21.59 ± 0.31", or "-"."""
    if top is None:
        return "-"
    return f"{100 - top.mean:.2f}" + (f" ± {top.half:.2f}" if top.n > 1 else "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _amount(value: int, digits: int, *units: tuple[float, str]) -> str:
    """In the first unit that is not too large for it: a fifth of one still is not."""
    size, unit = next((u for u in units if value >= u[0] / 5), units[-1])
    return f"{value / size:.{digits}f} {unit}"


COLUMNS: dict[str, Callable[[Entry], str]] = {
    "Method": lambda e: e.line.label,
    "#Params": lambda e: _amount(e.size.all, 2, (1e6, "M"), (1e3, "k")),
    "multiply-adds": lambda e: _amount(e.size.macs, 3, (1e9, "G"), (1e6, "M")),
    "printed top-1": lambda e: f"{e.line.printed.top1:.2f}" if e.line.printed else "-",
    "printed top-5": lambda e: f"{e.line.printed.top5:.2f}" if e.line.printed else "-",
    "ours top-1": lambda e: error(e.top1),
    "ours top-5": lambda e: error(e.top5),
    "seeds": lambda e: str(len(e.runs)) if e.runs else "-",
    "gap": lambda e: "-" if e.gap is None else f"{-e.gap:+.2f}",  # of errors, like the columns beside it
    "verdict": lambda e: e.verdict,
    "images/s": lambda e: _number(e.images_per_second, ".0f"),
    "GPU-hours": lambda e: _number(e.gpu_hours, ".1f"),
}


def columns(tally: Tally) -> dict[str, Callable[[Entry], str]]:
    """The columns of this table: those of a paper, and GPUs, only where there is one."""
    left_out = set()
    if not any(e.line.printed for e in tally.entries):
        left_out = {"printed top-1", "printed top-5", "gap"}
        if any(e.trained and not e.on_gpu for e in tally.entries):
            left_out.add("GPU-hours")
    return {name: cell for name, cell in COLUMNS.items() if name not in left_out}


def header(tally: Tally) -> str:
    """What the numbers are."""
    gap = "; gap = ours - printed, positive is worse" if "gap" in columns(tally) else ""
    return f"error rates in percent, ± the 95 % interval over seeds (t){gap}"


def missing(tally: Tally) -> list[str]:
    """The command of every missing cell."""
    return [command for entry in tally.entries for command in commands(entry)]


def commands(entry: Entry) -> list[str]:
    return [entry.line.command(seed) for seed in entry.missing]


def comparison(found: Comparison) -> str:
    return words(found.found, found.base.line.label, found.entry.line.label, found.p)


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
            "Compared (points of top-1 accuracy):",
            *(f"  {comparison(c)}" for c in tally.comparisons),
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
    names = columns(tally)
    lines = [f"## {tally.title}", "", f"E{header(tally)[1:]}."]
    for group in dict.fromkeys(e.line.group for e in tally.entries):
        lines += [
            "",
            *([f"### {group}", ""] if group != tally.grid.title else []),
            "| " + " | ".join(names) + " |",
            "| --- |" + " ---: |" * (len(names) - 1),
        ]
        lines += [
            "| " + " | ".join(cell(e).replace("|", "\\|") for cell in names.values()) + " |"
            for e in tally.entries
            if e.line.group == group
        ]
    if tally.comparisons:
        lines += [
            "",
            "Compared, in points of top-1 accuracy:",
            "",
            *(f"* {comparison(c)}" for c in tally.comparisons),
        ]
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
    """A table environment that needs no package."""
    names = columns(tally)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{tex(tally.title)}: {tex(header(tally))}.}}",
        rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}",
        r"\hline",
        " & ".join(map(tex, names)) + r" \\",
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
    """One line a row, plain numbers, accuracies as error rates in percent; empty where there is nothing."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(
        [
            "table",
            "group",
            "method",
            "faithful",
            "params",
            "macs",
            "printed_top1",
            "printed_top5",
            "top1",
            "top1_low",
            "top1_high",
            "top5",
            "seeds",
            "gap",
            "verdict",
            "images_per_second",
            "gpu_hours",
            "protocol",
            "missing",
            "selected",
        ]
    )
    chosen = {selection.name: selection.best for selection in tally.selections}
    for e in tally.entries:
        interval = e.top1 and e.top1.n > 1
        write(
            [
                tally.grid.name,
                e.line.group,
                e.line.label,
                tally.faithful,
                e.size.all,
                e.size.macs,
                e.line.printed.top1 if e.line.printed else "",
                e.line.printed.top5 if e.line.printed else "",
                f"{100 - e.top1.mean:.4f}" if e.top1 else "",
                f"{100 - e.top1.high:.4f}" if interval else "",
                f"{100 - e.top1.low:.4f}" if interval else "",
                f"{100 - e.top5.mean:.4f}" if e.top5 else "",
                " ".join(map(str, e.runs)),
                "" if e.gap is None else f"{-e.gap:.4f}",
                e.verdict,
                "" if e.images_per_second is None else f"{e.images_per_second:.2f}",
                "" if e.gpu_hours is None else f"{e.gpu_hours:.3f}",
                str(tally.stamp or ""),
                "; ".join(commands(e)),
                "" if chosen.get(e.line.tuned) is None else "yes" if chosen[e.line.tuned] is e else "no",
            ]
        )
    return out.getvalue()


FORMATS: dict[str, Callable[[Tally], str]] = {
    "terminal": text,
    "markdown": markdown,
    "latex": latex,
    "csv": as_csv,
}
