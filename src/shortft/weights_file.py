"""A look at a safetensors file that tells damage before anything heavy is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from shortft.errors import UserError

MAX_HEADER = 100_000_000  # as in safetensors itself


def check_weights_file(name: str, path: Path, remedy: str) -> None:
    """Whether a file is a whole safetensors file: its header, and as many bytes as that says.

    Args:
        name: how the message names it.
        remedy: the message's end.

    Raises:
        UserError: if it is cut off, something else, or cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length <= min(size, MAX_HEADER) else b""
        tensors = json.loads(header) if header else {}
        ends = [
            int(entry["data_offsets"][1]) for key, entry in tensors.items() if key != "__metadata__"
        ]
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        ends = []
    if not ends:
        raise UserError(f"{name}: is not a safetensors file, or its header is damaged; {remedy}")
    whole = 8 + length + max(ends)
    if size != whole:
        raise UserError(f"{name}: has {size:,} bytes instead of {whole:,}; {remedy}")
