"""Plans as a PNG: one lane per stage, its network calls from noise (left) to picture (right)."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from shortft.drawing.files import write_atomic
from shortft.drawing.plan_text import timestep_text

if TYPE_CHECKING:
    from shortft.plans import Plan, Step

INK, GREY, BLUE, BAND = "#222222", "#8A8A8A", "#0072B2", "#CDE9DF"
BAND_EDGE, BAND_INK = "#009E73", "#00785A"
# Four warm tones for LoRA 1, 2, 3, 4 …: ordered in lightness, apart without colour too.
LORA = ("#F6C667", "#E69F00", "#D55E00", "#7A2E00")
BLOCK, GAP = 0.15, 0.03


def plan_png(
    path: str | os.PathLike[str],
    stages: Sequence[tuple[str, Plan]],
    timesteps: Sequence[float],
    segments: Sequence[Sequence[int]] = (),
    notes: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Draw every plan in `stages` as (name, plan), one below the other.

    `timesteps`: of the N points, first to last. `segments`: point indices per segment, shaded.
    `notes[i]` (memory, time …) stands below stage i's counts.
    """
    times = [float(t) for t in timesteps]
    points = len(times)
    lane = _lane_height([plan for _, plan in stages])
    top = len(stages) * lane
    figure = Figure(figsize=(13, 1.5 + 0.7 * top), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    _segments(axis, segments, top)
    for row, (name, plan) in enumerate(stages):
        y = top - (row + 1) * lane + 0.46
        left, right = -0.03 * points, 1.03 * points
        _lane(axis, plan, y, points)
        axis.text(left, y + 0.1, name, ha="right", va="center", **_text(11, True))
        axis.text(right, y + 0.34, f"{plan.calls} calls", va="center", **_text(11, True))
        grad = f"{plan.grad_calls} with gradient"
        axis.text(right, y + 0.05, grad, va="center", **_text(10, colour=BAND_INK))
        if notes and notes[row]:
            axis.text(right, y - 0.22, notes[row], va="center", **_text(8.5, colour=GREY))
        if row:
            axis.axhline(top - row * lane, color="#DDDDDD", lw=0.8, zorder=0)
    _frame(axis, times, segments, top)
    axis.set_ylim(-0.55, top + (0.3 if len(segments) else 0.05))
    if title:
        axis.set_title(title, loc="left", pad=8, **_text(13, True))
    figure.legend(
        handles=_legend([plan for _, plan in stages]),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=9.5,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    return write_atomic(path, buffer.getvalue())


def _text(size: float, bold: bool = False, colour: str = INK) -> dict[str, Any]:
    return {"fontsize": size, "fontweight": "bold" if bold else "normal", "color": colour}


def _lora(number: int) -> str:
    return LORA[min(number, len(LORA)) - 1]


def _lane_height(plans: Sequence[Plan]) -> float:
    """Room for the tallest stack of LoRAs, for the arcs of jumps, and for the counts."""
    steps = [step for plan in plans for step in plan.steps]
    stack = max((step.adapters for step in steps), default=0) * (BLOCK + GAP)
    jumps = any(step.stop - step.start > 1 for step in steps)
    return 0.55 + max(0.55, stack, 0.75 if jumps else 0.0)


def _segments(axis: Axes, segments: Sequence[Sequence[int]], top: float) -> None:
    for n, segment in enumerate(segments):
        # Edges half-way to the neighbours; the last one reaches to the end of the chain.
        left = segment[0] - 0.5
        right = segment[-1] + (1.0 if n == len(segments) - 1 else 0.5)
        shade = ("#F7F8FA", "#EDF0F4")[n % 2]
        axis.add_patch(Rectangle((left, 0), right - left, top, color=shade, lw=0, zorder=-3))
        style = _text(10, colour=GREY)
        axis.text((left + right) / 2, top + 0.08, f"segment {n + 1}", ha="center", **style)


def _lane(axis: Axes, plan: Plan, y: float, points: int) -> None:
    width = 0.011 * points
    final = plan.steps[-1].stop
    axis.plot([0, final], [y, y], color="#BBBBBB", lw=1, zorder=1)
    axis.plot(final, y, marker="*", ms=12, color=INK, zorder=6)
    for step, carries in zip(plan.steps, plan.grad_mask, strict=True):
        if carries:
            band = Rectangle((step.start, y - 0.34), step.stop - step.start, 0.2, fc=BAND, lw=0)
            band.set(hatch="....", edgecolor=BAND_EDGE, alpha=1.0 if step.input_grad >= 1 else 0.55)
            axis.add_patch(band)
        if step.stop - step.start > 1:
            _arc(axis, step, y, width)
        if step.net == "base":
            axis.plot(step.start, y, marker="o", ms=3.2, color=GREY, zorder=3)
        elif step.net == "cached":
            axis.plot(step.start, y, marker="o", ms=3.2, color=GREY, mfc="white", zorder=3)
        elif step.net == "shortcut":
            axis.plot(step.start, y, marker="D", ms=5.5, color=BLUE, zorder=4)
        for number in range(1, step.adapters + 1):
            low = y - BLOCK / 2 + (number - 1) * (BLOCK + GAP)
            block = Rectangle(
                (step.start - width / 2, low), width, BLOCK, fc=_lora(number), zorder=5
            )
            trained = step.trains and number in plan.trainable
            block.set(edgecolor=INK if trained else "white", linewidth=1.4 if trained else 0.4)
            block.set_alpha(1.0 if trained else 0.6)
            axis.add_patch(block)
    if any(plan.grad_mask):
        begin = plan.steps[list(plan.grad_mask).index(True)].start
        ends = (final, y - 0.24), (begin, y - 0.24)
        arrow = FancyArrowPatch(*ends, arrowstyle="-|>", shrinkA=0, shrinkB=0, zorder=4)
        arrow.set(mutation_scale=11, color=BAND_EDGE)
        axis.add_patch(arrow)


def _arc(axis: Axes, step: Step, y: float, width: float) -> None:
    ends = (step.start, y + 0.05), (step.stop - width / 2, y + 0.05)
    style: dict[str, Any] = {
        "connectionstyle": "arc3,rad=-0.28",
        "arrowstyle": "-|>",
        "shrinkA": 0,
        "shrinkB": 1,
    }
    arc = FancyArrowPatch(*ends, zorder=3, **style)
    colour = BLUE if step.net == "shortcut" else GREY
    arc.set(mutation_scale=11, linewidth=2, color=colour)
    arc.set_linestyle((0, (4, 2)) if step.pin else "-")
    axis.add_patch(arc)


def _frame(
    axis: Axes, times: Sequence[float], segments: Sequence[Sequence[int]], top: float
) -> None:
    points = len(times)
    marks = [(s[e], e) for s in segments for e in (0, -1)]
    for point, end in marks or [(p, 0) for p in range(0, points, max(1, points // 10))]:
        # A segment's end and the next one's start are close: lean the labels away from each other.
        ha = "center" if not marks else "left" if end == 0 else "right"
        nudge = 0.0 if not marks else -0.3 if end == 0 else 0.3
        axis.plot([point] * 2, [-0.05, 0], color=GREY, lw=0.8, clip_on=False)
        label = timestep_text(times[point])
        axis.text(point + nudge, -0.1, label, ha=ha, va="top", **_text(9.5))
    axis.plot([points] * 2, [-0.05, 0], color=GREY, lw=0.8, clip_on=False)
    axis.text(points + 0.2, -0.1, "end", ha="left", va="top", **_text(9.5))
    where = "timestep (from noise to picture, left to right)"
    axis.text(points / 2, -0.4, where, ha="center", va="top", **_text(9.5, colour=GREY))
    axis.set_xlim(-0.1 * points, 1.17 * points)
    axis.axis("off")


def _legend(plans: Sequence[Plan]) -> list[Line2D | Patch]:
    steps = [step for plan in plans for step in plan.steps]
    adapters = max((step.adapters for step in steps), default=0)
    handles: list[Line2D | Patch] = []
    if any(step.net == "base" for step in steps):
        handles.append(Line2D([], [], marker="o", ls="", ms=4, color=GREY, label="base"))
    if any(step.net == "shortcut" for step in steps):
        handles.append(Line2D([], [], marker="D", ms=5, lw=2, color=BLUE, label="shortcut jump"))
    if any(step.net == "policy" and step.stop > step.start + 1 for step in steps):
        handles.append(Line2D([], [], lw=2, color=GREY, label="jump of the policy"))
    if any(step.net == "cached" for step in steps):
        hollow = Line2D([], [], marker="o", ls="", ms=4, color=GREY, mfc="white", label="cached")
        handles.append(hollow)
    if any(step.pin for step in steps if step.net != "cached"):
        label = "with the rollout's values"
        handles.append(Line2D([], [], ls=(0, (4, 2)), lw=2, color=BLUE, label=label))
    for number in range(1, min(adapters, len(LORA)) + 1):
        more = " and more" if number == len(LORA) < adapters else ""
        handles.append(Patch(fc=_lora(number), label=f"LoRA {number}{more}"))
    if any(step.trains for step in steps):
        handles.append(Patch(fc="white", ec=INK, lw=1.4, label="trained here"))
        handles.append(Patch(fc=BAND, ec=BAND_EDGE, hatch="....", lw=0, label="gradient flows"))
    handles.append(Line2D([], [], marker="*", ls="", ms=11, color=INK, label="reward looks here"))
    return handles
