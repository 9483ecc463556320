"""How every picture of the tools is drawn: small, light, in one style."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["COLOURS", "Picture", "draw_picture", "layers_on_x"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8a800")
WIDTH, DPI = 4.6, 130
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 8.5, "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5, "legend.fontsize": 7.5, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}  # fmt: skip
NAMED = 22
"""Layers up to which an axis has their names; above, their numbers."""


@dataclass(frozen=True)
class Picture:
    """A PNG. name: of its file, without the ending; caption: what it shows, in words."""

    name: str
    caption: str
    png: bytes


def draw_picture(
    name: str, caption: str, height: float, rows: int, draw: Callable[[list[Axes]], None], **grid
) -> Picture:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.subplots(rows, 1, squeeze=False, **grid)[:, 0]
        draw(list(axes))
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return Picture(name, caption, out.getvalue())


def layers_on_x(axes: Axes, names: Sequence[str]) -> None:
    if len(names) <= NAMED:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("layer, in the order of calls (from 0)")
