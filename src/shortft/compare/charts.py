"""The pictures of a comparison's report: curves, what gains are paid with, and a grid."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from shortft.compare.figures import Results, by_gain, curve, held_out, looked_at, names_shown
from shortft.compare.jobs import Workshop
from shortft.drawing.grids import save_grid
from shortft.drawing.lines import Line, Panel, draw_lines

if TYPE_CHECKING:
    from torch import Tensor


def draw_methods(results: Results, reward: str, path: Path) -> Path | None:
    """Reward against seconds of training, and against the held-out score that is left.

    What was not measured is left out; None if neither was.
    """
    label = f"reward {reward} on held-out prompts"
    over_time = Panel(
        time_lines(results, reward),
        "seconds of training",
        label,
        "Median over seeds; thin lines: each seed",
    )
    paid_with = Panel(
        end_points(results, reward),
        "held-out scorer",
        label,
        "What the gain is paid with; the upper right is better; thin lines: to each seed",
    )
    panels = [panel for panel in (over_time, paid_with) if panel.lines]
    return draw_lines(path, *panels) if panels else None


def time_lines(results: Results, reward: str) -> list[Line]:
    """One line per method that was looked at on the way, the highest end first."""
    lines = []
    names = names_shown([method for r, method in results if r == reward])
    for method, name in names.items():
        runs = looked_at(results[reward, method])
        if runs:
            times, values = curve(runs)
            thin = [([t for t, _ in run["curve"]], [v for _, v in run["curve"]]) for run in runs]
            strong = name == "shortft"
            lines.append(Line(name, times.tolist(), values.tolist(), thin, strong))
    return sorted(lines, key=lambda line: -line.y[-1])


def end_points(results: Results, reward: str) -> list[Line]:
    """The base's held-out score and reward, and every method's medians with rays to its seeds."""
    lines: list[Line] = []
    names = names_shown([method for r, method in results if r == reward])
    for method in by_gain(results, reward):
        runs = results[reward, method]
        x, y = held_out(runs), median([run["reward"]["after"] for run in runs])
        if x is None:
            continue
        if not lines:
            lines.append(
                Line("base", [runs[0]["held_out"]["before"]], [runs[0]["reward"]["before"]])
            )
        rays = [([x, run["held_out"]["after"]], [y, run["reward"]["after"]]) for run in runs]
        lines.append(Line(names[method], [x], [y], rays, strong=names[method] == "shortft"))
    return lines


def draw_grid(workshop: Workshop, reward: str, path: Path) -> Path | None:
    """Rows: the base and every method; columns: the same prompts and noise; the first seed."""
    from safetensors.torch import load_file

    rows: list[Tensor] = []
    labels: list[str] = []
    names = names_shown(workshop.comparison.methods)
    for job in workshop.jobs():
        if not job.search and job.done and job.reward == reward and job.seed == 0:
            pictures = load_file(job.folder / "pictures.safetensors")
            if not rows:
                rows.append(pictures["before"])
                labels.append("base")
            rows.append(pictures["after"])
            labels.append(names[job.method])
    if not rows:
        return None
    prompts = workshop.held_out_prompts()[: len(rows[0])]
    return save_grid(path, rows, labels, prompts, title=f"{reward}: same prompts and noise, seed 0")
