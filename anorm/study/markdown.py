"""Markdown tables: the one writer of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """Return the lines of a table; the first ``words`` columns stand left, numbers right. A bar in a cell is escaped."""
    rule = ["---" if i < words else "---:" for i in range(len(heads))]
    return [_line(heads), _line(rule), *(_line([cell.replace("|", "\\|") for cell in row]) for row in rows)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
