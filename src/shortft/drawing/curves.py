"""Training curves from the metrics log, drawn with matplotlib (no display, no global state)."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from shortft.drawing.files import write_atomic

# Okabe and Ito's palette: told apart with any common colour blindness.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#A0528A", "#666666"
ALARM = "#B03A00"
STAGE_SHADES = ("#F3F5F8", "#E6EAF0")


class Panel(NamedTuple):
    """A figure of the evaluations, and how its panel is called."""

    key: str
    title: str


LOOKS = (
    Panel("eval_diversity", "diversity: pictures of one prompt, 1 - cosine"),
    Panel("eval_contrast", "contrast of the pictures"),
    Panel("eval_saturated", "share of black and white pixels"),
)


@dataclass(frozen=True)
class Metrics:
    """The log of one run: one row per update, and one per evaluation."""

    updates: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]


def read_metrics(path: str | os.PathLike[str]) -> Metrics:
    """Read a metrics JSONL: a line with `eval_reward` is an evaluation, any other an update.

    A resumed run may write an update a second time: the later line counts. A last line that was
    cut off by a kill is skipped; a broken line elsewhere raises ValueError with its number.
    """
    updates: dict[int, Mapping[str, Any]] = {}
    evaluations: dict[int, Mapping[str, Any]] = {}
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            target = evaluations if "eval_reward" in row else updates
            target[int(row["update"])] = row
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a metrics row ({error})") from error
    return Metrics(
        tuple(updates[u] for u in sorted(updates)),
        tuple(evaluations[u] for u in sorted(evaluations)),
    )


def draw_curves(
    metrics: Metrics | str | os.PathLike[str],
    path: str | os.PathLike[str],
    title: str | None = None,
    reward_name: str = "reward",
) -> Path:
    """Draw `curves.png`: reward, evaluations, gradient norm, and what pictures became, of one run.

    Update rows: `update`, `reward`, and if known `stage`, `grad_norm`, `seconds` (what this update
    took) and `parts` (name → value, the parts of a mixed reward). Evaluation rows: `update`,
    `eval_reward`, and if known `eval_held_out`, `eval_diversity`, `eval_contrast`,
    `eval_saturated`, and `guard`, its alarm.
    """
    log = metrics if isinstance(metrics, Metrics) else read_metrics(metrics)
    updates = _column(log.updates, "update")
    minutes = np.cumsum(np.nan_to_num(_column(log.updates, "seconds"))) / 60
    parts = _part_names(log.updates)
    looks = [look for look in LOOKS if np.isfinite(_column(log.evaluations, look.key)).any()]
    rows = 2 + math.ceil((len(looks) + len(parts)) / 2)
    figure = Figure(figsize=(11, 3.4 * rows + 0.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.012, ha="left")
    axes: list[Axes] = list(np.ravel(figure.subplots(rows, 2)))
    reward = _column(log.updates, "reward")
    stages = _stages(log.updates)
    eval_updates = _column(log.evaluations, "update")
    eval_minutes = (
        np.interp(eval_updates, np.r_[0, updates], np.r_[0, minutes])
        if len(updates)
        else np.zeros_like(eval_updates)
    )
    eval_reward = _column(log.evaluations, "eval_reward")

    timed = bool(np.isfinite(_column(log.updates, "seconds")).any())
    for axis, x, eval_x, unit in (
        (axes[0], updates, eval_updates, "update"),
        (axes[1], minutes, eval_minutes, "minutes"),
    ):
        _frame(axis, unit, f"{reward_name} by {'update' if unit == 'update' else 'time'}")
        if unit == "minutes" and not timed:
            _not_measured(axis)
            continue
        _noisy(axis, x, reward, stages, BLUE, "training batch")
        _marks(axis, eval_x, eval_reward, ORANGE, "D", "evaluation")
        _shade_stages(axis, x, stages)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="lower right", fontsize=8, framealpha=0.9, edgecolor="none")

    _frame(axes[2], "update", "held-out scorer")
    _marks(axes[2], eval_updates, _column(log.evaluations, "eval_held_out"), GREEN, "o", "")
    best = [row["update"] for row in log.evaluations if row.get("best")]
    for update in best[-1:]:
        _flag(axes[2], update, " best", GREY, 0.1)
    for row in log.evaluations:
        if row.get("guard"):
            _flag(axes[2], row["update"], " guard", ALARM, 0.02)
    _frame(axes[3], "update", "gradient norm")
    norm = _column(log.updates, "grad_norm")
    _noisy(axes[3], updates, np.where(norm > 0, norm, np.nan), stages, PURPLE, "", log=True)
    for axis, panel in zip(axes[4:], looks, strict=False):
        _frame(axis, "update", panel.title)
        _marks(axis, eval_updates, _column(log.evaluations, panel.key), ORANGE, "D", "")
    first = 4 + len(looks)
    for axis, name in zip(axes[first:], parts, strict=False):
        _frame(axis, "update", f"part of the reward: {name}")
        part = np.array([_number(row.get("parts", {}).get(name)) for row in log.updates])
        _noisy(axis, updates, part, stages, BLUE, "")
    for axis in axes[2 : first + len(parts)]:
        _shade_stages(axis, updates, stages)
    for axis in axes[first + len(parts) :]:
        axis.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return write_atomic(path, buffer.getvalue())


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, fewer at the ends; not-a-number values are left out."""
    known = np.isfinite(values)
    total = np.r_[0.0, np.cumsum(np.where(known, values, 0.0))]
    count = np.r_[0, np.cumsum(known)]
    low = np.maximum(np.arange(len(values)) - window // 2, 0)
    high = np.minimum(np.arange(len(values)) + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = (total[high] - total[low]) / (count[high] - count[low])
    return mean


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _column(rows: Iterable[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([_number(row.get(key)) for row in rows], dtype=float)


def _part_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the parts, when there is more than one (a single part is the reward itself)."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("parts") or {}))
    return names if len(names) > 1 else []


def _stages(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, slice]]:
    """(stage, rows) for each run of rows of one stage."""
    stages: list[tuple[int, slice]] = []
    for i, row in enumerate(rows):
        stage = int(row.get("stage") or 1)
        if stages and stages[-1][0] == stage:
            stages[-1] = (stage, slice(stages[-1][1].start, i + 1))
        else:
            stages.append((stage, slice(i, i + 1)))
    return stages


def _frame(axis: Axes, x_label: str, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, pad=16)
    axis.set_xlabel(x_label, fontsize=9)
    axis.tick_params(labelsize=8.5, color="#AAAAAA")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#AAAAAA")
    axis.grid(axis="y", color="white", linewidth=1.2)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=x_label == "update"))


def _not_measured(axis: Axes) -> None:
    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=GREY)


def _noisy(
    axis: Axes,
    x: np.ndarray,
    y: np.ndarray,
    stages: Sequence[tuple[int, slice]],
    colour: str,
    label: str,
    log: bool = False,
) -> None:
    """Raw values faint, their running mean strong; the mean never looks across a stage's edge."""
    if not np.isfinite(y).any():
        _not_measured(axis)
        return
    axis.plot(x, y, color=colour, alpha=0.28, linewidth=0.9, label=label and f"{label}, each")
    window = max(5, len(y) // 25)
    for n, (_, rows) in enumerate(stages):
        part = np.log(y[rows]) if log else y[rows]
        mean = running_mean(part, window)
        mean_label = f"{label}, running mean" if label and n == 0 else None
        axis.plot(x[rows], np.exp(mean) if log else mean, color=colour, lw=2, label=mean_label)
    if log:
        axis.set_yscale("log")


def _marks(axis: Axes, x: np.ndarray, y: np.ndarray, colour: str, marker: str, label: str) -> None:
    if not np.isfinite(y).any():
        if not axis.lines:
            _not_measured(axis)
        return
    style: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 0.7, "markersize": 7}
    axis.plot(x, y, color=colour, marker=marker, lw=1.4, label=label or None, zorder=4, **style)
    for i in (0, len(x) - 1) if len(x) > 1 else (0,):
        label = f"{y[i]:.3g}" if abs(y[i]) >= 1 else f"{y[i]:.3f}"
        text = axis.annotate(
            label, (x[i], y[i]), (-4 if i == 0 else 4, 9), textcoords="offset points"
        )
        text.set(fontsize=8.5, ha="left" if i == 0 else "right", zorder=5)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    axis.margins(y=0.14)


def _flag(axis: Axes, update: int, label: str, colour: str, height: float) -> None:
    """A dashed line at an update, with its name at this share of the axis's height."""
    axis.axvline(update, color=colour, lw=1.2, ls="--")
    text = axis.annotate(label, (update, height), xycoords=("data", "axes fraction"))
    text.set(color=colour, fontsize=8.5, va="bottom")


def _shade_stages(axis: Axes, x: np.ndarray, stages: Sequence[tuple[int, slice]]) -> None:
    if not len(x):
        return
    edges = [0.0] + [float(x[rows.stop - 1]) for _, rows in stages]
    for n, (stage, _) in enumerate(stages):
        axis.axvspan(edges[n], edges[n + 1], color=STAGE_SHADES[n % 2], zorder=-2, lw=0)
        if len(stages) == 1:  # a method without stages, or not past the first one
            continue
        label = f"stage {stage}" if edges[n + 1] - edges[n] > 0.1 * edges[-1] else f"{stage}"
        middle = (edges[n] + edges[n + 1]) / 2
        axis.text(
            middle,
            1.02,
            label,
            transform=axis.get_xaxis_transform(),
            ha="center",
            fontsize=8,
            color=GREY,
        )
    axis.set_xlim(-0.02 * edges[-1], edges[-1] * 1.02 or 1)
