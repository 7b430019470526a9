"""The report of a comparison: a table (Markdown, CSV), curves over time, and a grid of pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from shortft.drawing.files import write_atomic
from shortft.drawing.progress import memory_text

if TYPE_CHECKING:
    from torch import Tensor

    from shortft.compare import Workshop

Results = dict[tuple[str, str], list[dict[str, Any]]]  # by reward and method, one per seed
HEADER = (
    "method",
    "reward, before → after",
    "gain",
    "in its own unit, before → after",
    "held-out scorer, before → after",
    "diversity, change",
    "s per update",
    "updates",
    "peak memory",
    "reaches the best rival in",
    "learning rate",
)


def write_report(workshop: Workshop) -> list[Path]:
    """Write results.md, results.csv, and curves and a grid per reward; returns their paths."""
    from shortft.compare import slug

    results = collect(workshop)
    root, spec = workshop.root, workshop.comparison
    paths: list[Path | None] = [
        write_atomic(root / "results.md", markdown(workshop, results).encode()),
        write_atomic(root / "results.csv", table_csv(results).encode()),
    ]
    for reward in spec.rewards:
        name = slug(reward)
        if not any(r == reward for r, _ in results):
            continue
        paths.append(draw_methods(results, reward, root / f"curves-{name}.png"))
        paths.append(draw_grid(workshop, reward, root / f"grid-{name}.png"))
    return [path for path in paths if path]


def collect(workshop: Workshop) -> Results:
    """Every finished run's result."""
    from shortft.compare import read_result

    results: Results = {}
    for job in workshop.jobs():
        if not job.search and job.done:
            results.setdefault((job.reward, job.method), []).append(read_result(job))
    return results


def gain(result: dict[str, Any]) -> float:
    """How much the reward on held-out prompts rose."""
    return float(result["reward"]["after"] - result["reward"]["before"])


def is_rival(method: str) -> bool:
    """Everything that is not ShortFT or an ablation of it."""
    return not method.startswith("shortft")


def spread(values: Sequence[float], form: str) -> str:
    """Median and range over seeds, such as ``0.25 (0.24 to 0.26)``."""
    low, middle, high = (format(v, form) for v in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def best_rival(results: Results, reward: str) -> tuple[str, list[dict[str, Any]]] | None:
    """The rival with the largest median gain."""
    rivals = {m: runs for (r, m), runs in results.items() if r == reward and is_rival(m)}
    if not rivals:
        return None
    return max(rivals.items(), key=lambda item: median(map(gain, item[1])))


def curve(runs: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of training and the median over seeds of the reward on the way.

    Seeds are brought onto the first one's times by linear interpolation.
    """
    times = np.array([point[0] for point in runs[0]["curve"]])
    values = [
        np.interp(times, [p[0] for p in run["curve"]], [p[1] for p in run["curve"]]) for run in runs
    ]
    return times, np.median(values, axis=0)


def seconds_to_reach(runs: Sequence[dict[str, Any]], level: float) -> float | None:
    """When the median curve first is at a level, by linear interpolation; None if never."""
    times, values = curve(runs)
    for i, value in enumerate(values):
        if value >= level:
            if i == 0:
                return float(times[0])
            share = (level - values[i - 1]) / (value - values[i - 1])
            return float(times[i - 1] + share * (times[i] - times[i - 1]))
    return None


def row(results: Results, reward: str, method: str) -> tuple[str, ...]:
    """One line of the table."""
    runs = results[reward, method]
    rival = best_rival(results, reward)
    reached = "no rival ran"
    if rival is not None:
        level = float(curve(rival[1])[1][-1])
        when = seconds_to_reach(runs, level)
        reached = "not reached" if when is None else f"{when:.0f} s"
    own = [
        f"{first['name']} {'↑' if first['higher_is_better'] else '↓'}: {first['before']:.4g} → "
        + spread([run["reports"][part]["after"] for run in runs], ".4g")
        for part, first in runs[0]["reports"].items()
    ]
    held_out = [run["held_out"]["after"] for run in runs if "held_out" in run]
    variety = [
        100 * (run["diversity"]["after"] / run["diversity"]["before"] - 1)
        for run in runs
        if "diversity" in run
    ]
    before = median([run["reward"]["before"] for run in runs])
    return (
        method,
        f"{before:.3f} → {spread([run['reward']['after'] for run in runs], '.3f')}",
        spread([gain(run) for run in runs], "+.4f"),
        "<br>".join(own),
        f"{runs[0]['held_out']['before']:.3f} → {spread(held_out, '.3f')}" if held_out else "none",
        f"{spread(variety, '+.0f')} %" if variety else "none",
        spread([run["seconds_per_update"] for run in runs], ".2f"),
        spread([run["updates"] for run in runs], ".0f"),
        memory_text(median([run["peak_memory_bytes"] for run in runs])),
        reached,
        spread([run["learning_rate"] for run in runs], "g"),
    )


def markdown(workshop: Workshop, results: Results) -> str:
    """The whole report as Markdown."""
    spec = workshop.comparison
    lines = [
        "# Methods at equal training time",
        "",
        f"{spec.seeds} seed(s), {spec.minutes:g} minutes of training each (sampling, evaluation "
        f"and loading not counted), the same LoRA rank, optimizer and batch; measured by the plain "
        f"chain on {spec.num_prompts} held-out prompts × {spec.noises} noises. Medians with the "
        "range over seeds.",
        "",
    ]
    if len(spec.search) > 1:
        rates = ", ".join(f"{rate:g}" for rate in spec.search)
        lines += [
            f"Learning rates: {rates}, each tried for {spec.search_minutes:g} minutes per method "
            "and reward, on other prompts and with another seed; the best by reward was taken.",
            "",
        ]
    for reward in spec.rewards:
        methods = [m for m in spec.methods if (reward, m) in results]
        methods.sort(key=lambda m: -median(map(gain, results[reward, m])))
        lines += [f"## {reward}", "", _line(HEADER), _line(["---"] * len(HEADER))]
        lines += [_line(row(results, reward, m)) for m in methods]
        lines += ["", *verdict(results, reward), ""]
        warnings = [
            f"- {m}, seed {run['seed']}: {warning}"
            for m in methods
            for run in results[reward, m]
            for warning in run["warnings"]
        ]
        lines += [*warnings, ""] if warnings else []
    return "\n".join(lines)


def verdict(results: Results, reward: str) -> list[str]:
    """How shortft stands against the best rival; nothing if either did not run."""
    rival, ours = best_rival(results, reward), results.get((reward, "shortft"))
    if rival is None or not ours:
        return []
    name, theirs = rival
    ours_gain, their_gain = median(map(gain, ours)), median(map(gain, theirs))
    apart = min(map(gain, ours)) > max(map(gain, theirs))
    ratio = f"{ours_gain / their_gain:.2f}" if their_gain > 0 else "not defined"
    return [
        f"shortft against the best rival, {name}: gain ratio {ratio}; ranges over seeds "
        f"{'are apart' if apart else 'overlap' if ours_gain > their_gain else 'say it lost'}."
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_csv(results: Results) -> str:
    """One line per run, plain numbers."""
    out = io.StringIO()
    writer = csv.writer(out)
    names = ["reward", "method", "seed", "learning_rate", "before", "after", "held_out_before"]
    names += ["held_out_after", "diversity_before", "diversity_after", "updates"]
    names += ["training_seconds", "peak_memory_bytes", "skipped"]
    writer.writerow(names)
    for (reward, method), runs in results.items():
        for run in runs:
            cells = [reward, method, run["seed"], run["learning_rate"]]
            for figure in ("reward", "held_out", "diversity"):
                cells += [run.get(figure, {}).get(when, "") for when in ("before", "after")]
            rest = ("updates", "training_seconds", "peak_memory_bytes", "skipped")
            writer.writerow([*cells, *(run[name] for name in rest)])
    return out.getvalue()


def draw_methods(results: Results, reward: str, path: Path) -> Path:
    """Reward on held-out prompts against seconds of training, one line per method."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    methods = [method for r, method in results if r == reward]
    order = sorted(methods, key=lambda m: -float(curve(results[reward, m])[1][-1]))
    colours, markers = colormaps["tab10"], "oDsv^Pp*Xh<>"
    for number, method in enumerate(order):
        runs = results[reward, method]
        times, values = curve(runs)
        style: dict[str, Any] = {"color": colours(number % 10), "marker": markers[number % 12]}
        width = 2.6 if method == "shortft" else 1.4
        axis.plot(times, values, lw=width, ms=5, label=method, **style)
        for run in runs:
            points = np.array(run["curve"])
            axis.plot(points[:, 0], points[:, 1], lw=0.6, alpha=0.35, color=style["color"])
    axis.set_xlabel("seconds of training")
    axis.set_ylabel(f"reward {reward} on held-out prompts")
    axis.set_title("Median over seeds; thin lines: each seed", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E8E8E8")
    axis.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return write_atomic(path, buffer.getvalue())


def draw_grid(workshop: Workshop, reward: str, path: Path) -> Path | None:
    """Rows: the base and every method; columns: the same prompts and noise; the first seed."""
    from safetensors.torch import load_file

    from shortft.drawing.grids import save_grid

    rows: list[Tensor] = []
    labels: list[str] = []
    for job in workshop.jobs():
        if not job.search and job.done and job.reward == reward and job.seed == 0:
            pictures = load_file(job.folder / "pictures.safetensors")
            if not rows:
                rows.append(pictures["before"])
                labels.append("base")
            rows.append(pictures["after"])
            labels.append(job.method)
    if not rows:
        return None
    prompts = workshop.held_out_prompts()[: len(rows[0])]
    return save_grid(path, rows, labels, prompts, title=f"{reward}: same prompts and noise, seed 0")
