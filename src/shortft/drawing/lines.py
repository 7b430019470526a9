"""A chart of labelled lines, told apart by colour and marker (no display, no global state)."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shortft.drawing.files import write_atomic

MARKERS = "oDsv^Pp*Xh<>"


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: in the legend.
        x, y: its points.
        thin: further lines of the same colour, (x, y) each.
        strong: drawn wide.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    thin: Sequence[tuple[Sequence[float], Sequence[float]]] = ()
    strong: bool = False


@dataclass(frozen=True)
class Panel:
    """Axes with their lines; `log` names the logarithmic ones: "", "x", "y" or "xy"."""

    lines: Sequence[Line]
    x_label: str
    y_label: str
    title: str = ""
    log: str = ""
    falling_x: bool = False


def draw_lines(path: str | os.PathLike[str], *panels: Panel, width: float = 9.0) -> Path:
    """Draw panels below one another, as PNG; a label has the same colour in all of them."""
    figure = Figure(figsize=(width, 5.4 * len(panels)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    colours = colormaps["tab10"]
    for number, panel in enumerate(panels, start=1):
        axis = figure.add_subplot(len(panels), 1, number)
        for line in panel.lines:
            place = labels.index(line.label)
            style: dict[str, Any] = {"color": colours(place % 10), "marker": MARKERS[place % 12]}
            axis.plot(
                line.x, line.y, lw=2.6 if line.strong else 1.4, ms=5, label=line.label, **style
            )
            for x, y in line.thin:
                axis.plot(x, y, lw=0.6, alpha=0.35, color=style["color"])
        if "x" in panel.log:
            axis.set_xscale("log")
        if "y" in panel.log:
            axis.set_yscale("log")
        if panel.falling_x:
            axis.invert_xaxis()
        axis.set_xlabel(panel.x_label)
        axis.set_ylabel(panel.y_label)
        axis.set_title(panel.title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#E8E8E8")
        axis.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return write_atomic(path, buffer.getvalue())
