"""One run at a time in an output folder: two would delete each other's checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shortft.errors import UserError

NAME = ".lock"


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold an output folder while the body runs; the lock dies with its process.

    File systems without locks, and Windows, let everybody in.

    Raises:
        UserError: if another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (root / NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read().strip()
            raise UserError(
                f"--output-dir {root}: another run is writing there"
                f"{f' (process {other})' if other else ''}; wait for it, stop it, or name another "
                "folder"
            ) from None
        except OSError:  # no locks on this file system
            yield
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
