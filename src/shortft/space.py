"""Whether what is about to be written fits on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from shortft.drawing.progress import memory_text
from shortft.errors import UserError


def check_space(directory: Path, needed: int, what: str, remedy: str) -> None:
    """Tell before slow work if its files will not fit.

    Args:
        directory: that ``--output-dir`` names; it need not exist yet.
        needed: bytes.
        what: takes them, as in "the run's checkpoints".
        remedy: besides freeing space or naming another directory.

    Raises:
        UserError: if less is free.
    """
    place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"--output-dir {directory}: {memory_text(free)} free, but {what} take "
            f"{memory_text(needed)}; free some space, {remedy}or name another directory"
        )


def size_of(place: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 where there is neither, as for a hub id."""
    files = [place] if place.is_file() else [f for f in place.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)
