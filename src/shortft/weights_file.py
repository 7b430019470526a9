"""A look at files of weights that tells damage before anything heavy is loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

from shortft.errors import UserError

# safetensors allows 100 MB, which take seconds and gigabytes to parse. A LoRA or model of thousands
# of tensors has less than 1 MB, and trainers' own notes on top take a few.
MAX_HEADER = 20_000_000


def check_weights_file(name: str, path: Path, remedy: str) -> None:
    """Whether a file of weights is whole safetensors: its header, and as many bytes as that says.

    Args:
        name: how the message names it.
        remedy: the message's end.

    Raises:
        UserError: if it is cut off, something else, cannot be read, or has a header that no model
            needs.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if MAX_HEADER < length <= size:
                raise UserError(
                    f"{name}: has a header of {length:,} bytes, which no model needs (at most "
                    f"{MAX_HEADER:,} are read); {remedy}"
                )
            header = file.read(length) if length <= size else b""
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


def disk_error(error: Exception, path: Path) -> OSError:
    """What safetensors' own exception says of a file that the disk refused."""
    code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
    return OSError(code, os.strerror(code), str(path))


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
