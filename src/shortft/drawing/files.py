"""Pictures appear whole or not at all: write beside the target, then rename."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` (parents are made) so that no reader ever sees half a file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Plain open() rather than tempfile: the file then gets the user's normal permissions.
    # The short name keeps a long target name within the file system's limit.
    tmp = target.parent / f".tmp-{os.getpid()}-{threading.get_ident()}"
    try:
        tmp.write_bytes(data)
        tmp.replace(target)
    except OSError as error:
        error.filename = error.filename or str(target)  # that of a full disk names no file
        raise
    finally:
        tmp.unlink(missing_ok=True)
    return target
