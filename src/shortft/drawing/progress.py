"""The progress line of a training run, and the table at its end."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_SECONDS = 15.0


class TrainProgress:
    """Shows how training goes; use as a context manager around the loop.

    On a terminal: one live bar. Elsewhere (a log file, CI): a plain line about every 15 seconds,
    for the first and for the last update. The run ends at `total_updates` or after `minutes`,
    whichever comes first, and bar and remaining time follow the nearer one; at least one must be
    given. A resumed run passes the updates and seconds that lie behind it.
    """

    def __init__(
        self,
        total_updates: int | None = None,
        minutes: float | None = None,
        stages: int = 1,
        *,
        start_update: int = 0,
        start_seconds: float = 0.0,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        window: int = 20,
    ) -> None:
        if total_updates is None and minutes is None:
            raise ValueError("TrainProgress needs total_updates, minutes, or both")
        self.total_updates, self.minutes, self.stages = total_updates, minutes, stages
        self.start_update, self.start_seconds, self.enabled = start_update, start_seconds, enabled
        self.console = console or Console()
        self.clock = clock
        self.began = clock()
        self.rewards: deque[float] = deque(maxlen=window)
        self.durations: deque[float] = deque(maxlen=window)
        self.fraction = 0.0
        self.spent = 0.0  # on updates: pictures and checkpoints are outside the budget
        self.last_line = ""
        self.last_shown: str | None = None
        self.next_plain = -math.inf
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def __enter__(self) -> TrainProgress:
        self.began = self.last_time = self.clock()
        self.fraction = self._done(self.start_update, self.start_seconds)
        if self.enabled and self.console.is_terminal:
            columns = (BarColumn(bar_width=16), TextColumn("{task.description}", markup=False))
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("starting …", total=1.0)
            self.bar.update(self.task, completed=self.fraction)
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif self.enabled and self.last_line and self.last_line != self.last_shown:
            self._plain(self.last_line)

    def update(
        self,
        update: int,
        stage: int,
        reward: float,
        seconds: float | None = None,
        peak_memory_bytes: int | None = None,
    ) -> None:
        """Report that `update` updates (counted from the run's very start) are done.

        `seconds`: what this update took; measured since the last call where it is not given.
        """
        now = self.clock()
        self.durations.append(now - self.last_time if seconds is None else seconds)
        self.last_time = now
        if math.isfinite(reward):
            self.rewards.append(reward)
        if not self.enabled:
            return
        self.spent += self.durations[-1]
        elapsed = self.start_seconds + self.spent
        self.fraction, left = self._done(update, elapsed), self._left(update, elapsed)
        per_update = sum(self.durations) / len(self.durations)
        mean = sum(self.rewards) / len(self.rewards) if self.rewards else math.nan
        total = f"/{self.total_updates}" if self.total_updates is not None else ""
        fields = [f"{update}{total}", f"reward {mean:.3f}", f"{_short(per_update)}/update"]
        if self.stages > 1:
            fields.insert(0, f"stage {stage}/{self.stages}")
        fields.append(f"{clock_text(left)} left")
        if peak_memory_bytes:
            fields.append(memory_text(peak_memory_bytes))
        self.last_line = " · ".join(fields)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.fraction, description=self.last_line)
        elif now >= self.next_plain:
            self._plain(self.last_line)
            self.next_plain = now + PLAIN_EVERY_SECONDS

    def log(self, message: str) -> None:
        """Print a line of its own, above the bar."""
        if self.enabled:
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _plain(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self.last_shown = line

    def _done(self, update: int, elapsed: float) -> float:
        """The share of the budget that is spent: of updates or of minutes, whichever is larger."""
        updates = update / max(1, self.total_updates) if self.total_updates is not None else 0.0
        minutes = elapsed / max(1e-9, self.minutes * 60) if self.minutes is not None else 0.0
        return min(1.0, max(updates, minutes))

    def _left(self, update: int, elapsed: float) -> float:
        """Seconds until the first budget runs out."""
        left = math.inf
        if self.total_updates is not None:
            per_update = sum(self.durations) / len(self.durations)
            left = max(0, self.total_updates - update) * per_update
        return left if self.minutes is None else min(left, max(0.0, self.minutes * 60 - elapsed))


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The end of a run as a table.

    `summary`: `reward`, `held_out`, `diversity`, each with `name`, `before`, `after`; `updates`,
    `seconds`, `seconds_per_update`, `peak_memory_bytes`. Absent keys are left out.
    """
    cost = _cost_line(summary)
    title = "Held-out prompts, same noise"
    table = Table(title=title, title_justify="left", title_style="bold", caption=cost)
    table.caption_justify, table.caption_style = "left", ""
    for name in ("", "measure"):
        table.add_column(name, no_wrap=not name)
    for name in ("base", "tuned", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, label in (("reward", "reward"), ("held_out", "held out"), ("diversity", "diversity")):
        if key not in summary:
            continue
        row = summary[key]
        before, after = float(row["before"]), float(row["after"])
        change = after - before
        colour = "blue" if change > 0 else "yellow" if change < 0 else ""
        percent = f" ({100 * change / abs(before):+.0f} %)" if before else ""
        number = Text(f"{_figure(change, sign=True)}{percent}", style=f"bold {colour}".strip())
        table.add_row(label, Text(str(row["name"])), _figure(before), _figure(after), number)
    return table


def clock_text(seconds: float) -> str:
    """1:05 for a minute and five seconds, 2:03:04 with hours."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def memory_text(size: float) -> str:
    """Bytes as MB or GB (powers of 1000)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _short(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def _figure(value: float, sign: bool = False) -> str:
    digits = 4 if abs(value) < 10 else 2
    return f"{value:{'+' if sign else ''}.{digits}f}"


def _cost_line(summary: Mapping[str, Any]) -> str:
    fields = []
    if "updates" in summary:
        fields.append(f"{summary['updates']} updates")
    if "seconds" in summary:
        fields.append(f"{clock_text(float(summary['seconds']))} in all")
    if "seconds_per_update" in summary:
        fields.append(f"{_short(float(summary['seconds_per_update']))} per update")
    if summary.get("peak_memory_bytes"):
        fields.append(f"peak memory {memory_text(float(summary['peak_memory_bytes']))}")
    return " · ".join(fields)
