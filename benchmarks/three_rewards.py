"""The demo with three rewards and several seeds: what training changes on held-out prompts.

    python benchmarks/three_rewards.py [--output-dir runs/three-rewards] [--minutes 3.5] [--seeds 3]

Every run is `shortft demo` with another reward or seed. The pictures that are measured come from
the same prompts and noise in all runs; only the training differs. A run whose summary.json exists
is not repeated, so the benchmark can be interrupted and continued. Use another folder after
changing SPECS or the minutes.

Printed and written to results.md: a Markdown table, each figure as mean (minimum to maximum) over
the seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from shortft.demo import demo
from shortft.errors import UserError

SPECS = {
    "text alignment": "clip",
    "symmetry": "clip:1,symmetry:2",
    "compressibility": "clip:1,compressibility:0.1",
}
HEADER = (
    "trained for",
    "reward, before → after",
    "in its own unit, before → after",
    "held-out scorer, before → after",
    "diversity, change",
)


def run(out: Path, name: str, spec: str, minutes: float | None, seed: int) -> dict[str, Any]:
    """The summary of one run, which is made only if it is not there yet."""
    folder = out / f"{name.replace(' ', '-')}-{seed}"
    summary = folder / "summary.json"
    if not summary.exists():
        demo(output_dir=folder, reward=spec, minutes=minutes, seed=seed)
    return dict(json.loads(summary.read_text(encoding="utf-8")))


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and range, such as ``0.250 (0.240 to 0.260)``; the mean alone if all are equal."""
    low, middle, high = (format(v, form) for v in (min(values), mean(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def before_after(figures: Sequence[dict[str, Any]]) -> str:
    """The same figure of several runs."""
    return " → ".join(spread([f[when] for f in figures]) for when in ("before", "after"))


def table_row(name: str, spec: str, summaries: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """One row of the table: a reward over its seeds."""
    reports = [
        f"{first['name']} {'↑' if first['higher_is_better'] else '↓'}: "
        + before_after([s["reports"][part] for s in summaries])
        for part, first in summaries[0]["reports"].items()
    ]
    diversity = [s["diversity"] for s in summaries]
    changes = [100 * (d["after"] / d["before"] - 1) for d in diversity]
    return (
        f"{name} (`{spec}`)",
        before_after([s["reward"] for s in summaries]),
        "<br>".join(reports),
        before_after([s["held_out"] for s in summaries]),
        f"{spread(changes, '+.0f')} %",
    )


def notes(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """How the figures came about, and every warning about collapsed pictures."""
    summaries = [s for group in found.values() for s in group]
    first = summaries[0]
    lines = [
        f"{first['prompts']} held-out prompts × {first['seeds_per_prompt']} noises, "
        f"{first['num_steps']} steps; mean (minimum to maximum) over "
        f"{len(next(iter(found.values())))} training seeds; "
        f"{spread([s['updates'] for s in summaries], '.0f')} updates in "
        f"{spread([s['training_seconds'] / 60 for s in summaries], '.1f')} minutes of training."
    ]
    for name, group in found.items():
        lines += [
            f"Warning, {name}, seed {i}: {w}" for i, s in enumerate(group) for w in s["warnings"]
        ]
    return lines


def markdown(found: dict[str, list[dict[str, Any]]]) -> str:
    """The table and its notes."""
    rows = [HEADER, ("---",) * len(HEADER)]
    rows += [table_row(name, SPECS[name], summaries) for name, summaries in found.items()]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *notes(found)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/three-rewards"))
    parser.add_argument("--minutes", type=float, help="of training per run; default: the demo's")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds 0, 1, … per reward")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: give 1 or more")
    out: Path = options.output_dir
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SPECS}
    try:
        for seed in range(options.seeds):
            for name, spec in SPECS.items():
                found[name].append(run(out, name, spec, options.minutes, seed))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = markdown(found)
    (out / "results.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
