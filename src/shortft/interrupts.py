"""Stopping a run by a signal: the first one at the next safe place, the second one at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from shortft.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOGETHER = 2.0  # seconds: what tells a whole group of processes may reach one of them twice


class Interrupts:
    """Catches SIGINT and SIGTERM while a run goes on; use as a context manager.

    An update that was interrupted before its optimizer step leaves no trace, so that a lone
    process is stopped wherever it is. From `hold` to `release`, while weights, counters and logs
    must change together, a signal waits. Processes of one run must stop at the same update: with
    `immediate` off a signal only is noted, and they agree on it at the end of an update.
    """

    def __init__(self, *, immediate: bool) -> None:
        self.immediate = immediate
        self.asked: int | None = None
        self._asked_at = 0.0
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and time.monotonic() - self._asked_at < TOGETHER:
            return
        if self.asked is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked, self._asked_at = number, time.monotonic()
        if self.immediate and not self._held:
            raise Stopped(number)

    def hold(self) -> None:
        """From here on a signal waits."""
        self._held = True

    def release(self) -> None:
        """A signal may stop the run again, and does if one has come.

        Raises:
            Stopped: if so.
        """
        self._held = False
        if self.immediate and self.asked is not None:
            raise Stopped(self.asked)
