"""One process at a time: in an output folder, where two would delete each other's checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shortft.errors import UserError

NAME = ".lock"


class Taken(Exception):
    """Another process holds a lock.

    Attributes:
        process: its number; empty while it is not known.
    """

    def __init__(self, process: str) -> None:
        super().__init__(process)
        self.process = process


@contextmanager
def locked(path: Path) -> Iterator[int | None]:
    """Hold a lock file while the body runs.

    The lock dies with its process and with those that the descriptor is passed on to. The file
    stays.

    Yields:
        The descriptor; None where there are no locks (some file systems, and Windows), which lets
        everybody in.

    Raises:
        Taken: if another holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Taken(file.read().strip()) from None
        except OSError:  # no locks on this file system
            yield None
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold an output folder while the body runs.

    Raises:
        UserError: if another process holds it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(root / NAME))
        except Taken as taken:
            raise UserError(
                f"--output-dir {root}: another run is writing there"
                f"{f' (process {taken.process})' if taken.process else ''}; wait for it, stop it, "
                "or name another folder"
            ) from None
        yield
