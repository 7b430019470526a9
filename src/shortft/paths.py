"""Looking for files under names that a user typed, which may be no names at all.

pathlib raises for a name that is too long, holds a NUL, or starts with an unknown ``~user``.
"""

from __future__ import annotations

from pathlib import Path

IMPOSSIBLE = (OSError, ValueError, RuntimeError)


def is_file(name: str | Path) -> bool:
    """Whether there is such a file."""
    try:
        return Path(name).is_file()
    except IMPOSSIBLE:
        return False


def is_dir(name: str | Path) -> bool:
    """Whether there is such a directory."""
    try:
        return Path(name).is_dir()
    except IMPOSSIBLE:
        return False


def exists(name: str | Path) -> bool:
    """Whether there is anything of that name."""
    return is_file(name) or is_dir(name)


def expand(path: Path) -> Path:
    """The path with its ``~`` replaced, where somebody has such a home."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path
