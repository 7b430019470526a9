"""The log of a run: one JSON object per line, cut back to its checkpoint on resume."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """One JSON object per line; a resumed run cuts off what came after its checkpoint."""

    def __init__(self, path: Path, length: int, *, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        if enabled:
            path.touch()
            os.truncate(path, min(length, path.stat().st_size))

    def write(self, row: dict[str, Any]) -> None:
        if self.enabled:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(without_nan(row), allow_nan=False) + "\n")

    def position(self) -> int:
        return self.path.stat().st_size if self.enabled else 0


def without_nan(value: Any) -> Any:
    """The same with null for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
