"""The log of a run: one JSON object per line, cut back to its checkpoint on resume."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """One JSON object per line; a resumed run cuts off what came after its checkpoint.

    Attributes:
        lost: bytes that the checkpoint knew of and that are no longer there as whole lines.
    """

    def __init__(self, path: Path, length: int, *, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        self.lost = 0
        if enabled:
            path.touch()
            kept = path.read_bytes()[:length]
            whole = kept[: kept.rfind(b"\n") + 1]
            self.lost = length - len(whole)
            os.truncate(path, len(whole))

    def write(self, row: dict[str, Any]) -> None:
        """Append a row: the whole line, or nothing and an OSError."""
        if not self.enabled:
            return
        line = (json.dumps(without_nan(row), allow_nan=False) + "\n").encode()
        end = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(line)
        except OSError:
            os.truncate(self.path, end)
            raise

    def position(self) -> int:
        """Bytes written, which from now on outlast a power cut."""
        if not self.enabled:
            return 0
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size


def without_nan(value: Any) -> Any:
    """The same with null for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
