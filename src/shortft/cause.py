"""Where the traceback of somebody else's error, such as a reward's, is kept."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shortft.drawing.files import write_atomic
from shortft.errors import UserError, traceback_file


def note_cause(folder: Path, reason: BaseException) -> None:
    """Keep the traceback of what an error was made of, in a file of the process that met it."""
    if reason.__cause__ is not None:
        text = "".join(traceback.format_exception(reason.__cause__))
        write_atomic(folder / traceback_file(), text.encode())


@contextmanager
def noting_cause(folder: Path) -> Iterator[None]:
    """The same for a user's mistake that leaves the body."""
    try:
        yield
    except UserError as error:
        note_cause(folder, error)
        raise
