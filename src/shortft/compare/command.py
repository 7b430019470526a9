"""The command: run what is left, then write the report."""

from __future__ import annotations

from pathlib import Path

from shortft.compare.evaluation import evaluator
from shortft.compare.jobs import Workshop
from shortft.compare.report import write_report
from shortft.compare.runs import run_all
from shortft.compare.spec import Comparison
from shortft.config import Config
from shortft.errors import UserError
from shortft.interrupts import Interrupts


def compare_command(
    output_dir: Path,
    comparison: Comparison,
    base: Config,
    *,
    report_only: bool = False,
    command: str = "",
) -> None:
    """`shortft compare`: run what is left, then write the report.

    Args:
        command: what the user typed, for the report.

    Raises:
        UserError: if a run fails, or if nothing is done yet and only the report is wanted.
    """
    from rich.console import Console

    console = Console()
    workshop = Workshop(output_dir, comparison, base)
    workshop.prepare()
    if report_only:
        if not any(job.done and not job.search for job in workshop.jobs()):
            raise UserError(f"--report-only: no run in {output_dir} is done yet")
        for path in write_report(workshop, command):
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)
        return
    console.print(
        f"{len(comparison.methods)} methods × {len(comparison.rewards)} rewards × "
        f"{comparison.seeds} seeds: {comparison.runs()} runs and {comparison.trials()} trials of "
        f"learning rates, {comparison.cost_minutes():.0f} minutes of training in all; loading and "
        "evaluation come on top",
        highlight=False,
    )
    with Interrupts(immediate=True):
        run_all(
            workshop,
            evaluator(workshop),
            lambda text: console.print(text, markup=False, highlight=False),
        )
    for path in write_report(workshop, command):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
