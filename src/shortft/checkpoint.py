"""Checkpoints that are whole or absent: safetensors and JSON, verified before they are used.

A checkpoint is written into a temporary folder, every file synced, a SHA-256 manifest last; then
the folder is renamed, its parent synced, and only after that are old ones deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shortft.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.json"
ASIDE = ".old-"
# RecursionError: JSON in too many brackets.
DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    RecursionError,
    SafetensorError,
)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its folder.
        tensors: file name without suffix → tensors by name.
        state: counters and configuration.
    """

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    root: Path,
    update: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`; first, what crashes left behind.

    One run at a time may write there (`lock.only_one`).

    Raises:
        UserError: if the disk refuses; what was there before stays.
    """
    final = root / f"update-{update:06d}"
    scratch = root / f".{final.name}.{os.getpid()}"
    files = {
        f"{name}.safetensors": save({k: v.detach().cpu().contiguous() for k, v in group.items()})
        for name, group in tensors.items()
    }
    files[STATE] = json.dumps(dict(state), indent=2).encode()
    files[MANIFEST] = manifest_of(files)
    aside: list[tuple[Path, Path]] = []
    try:
        if not root.exists():
            root.mkdir(parents=True)
            sync_folder(root.parent)
        for left in root.glob(".update-*"):  # they may be what fills the disk
            shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir()
        for name, data in files.items():
            _write_synced(scratch / name, data)
        sync_folder(scratch)
        # Later ones were passed over as damaged when this run went back to before them.
        for path in [path for path in _all(root) if _number(path) >= update]:
            hidden = root / f"{ASIDE}{path.name}"
            shutil.rmtree(hidden, ignore_errors=True)
            aside.append((path, path.rename(hidden)))
        scratch.rename(final)
        sync_folder(root)
    except OSError as error:
        if not final.exists():
            for path, hidden in aside:
                with contextlib.suppress(OSError):
                    hidden.rename(path)
        shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(
            f"{final}: cannot be written ({error.strerror or error}); the checkpoint before it is "
            "whole: make room or mend the disk, then go on by --resume"
        ) from error
    runs_own = [path for path in _all(root) if _number(path) >= 0]  # a user may keep copies there
    for old in (*runs_own[keep:], *root.glob(f"{ASIDE}*")):
        shutil.rmtree(old, ignore_errors=True)
    return final


def manifest_of(files: Mapping[str, bytes]) -> bytes:
    """The manifest of files."""
    return manifest({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def manifest(sums: Mapping[str, str]) -> bytes:
    """File → SHA-256 sum, in the one spelling that is accepted."""
    return json.dumps(dict(sorted(sums.items())), indent=2).encode()


def load_latest(root: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole.

    Returns:
        It, and one line for each newer one that was damaged and passed over.

    Raises:
        UserError: if there is none.
    """
    problems: list[str] = []
    # A crash between two renames leaves the newest one hidden; one that was written since is newer.
    found = [*_all(root), *root.glob(f"{ASIDE}update-*")]
    for path in sorted(found, key=lambda p: (_number(p), p.name[0] != "."), reverse=True):
        try:
            return _read(path), problems
        except DAMAGED as error:
            problems.append(f"{path}: damaged ({error}); using the one before it")
    why = f" ({problems[0]})" if problems else ""
    raise UserError(
        f"--resume: no usable checkpoint in {root}{why}; start without --resume, or name the "
        "run's folder by --output-dir"
    )


def any_in(root: Path) -> bool:
    """Whether a checkpoint was ever finished there, damaged or not."""
    return bool(names_in(root))


def names_in(root: Path) -> list[str]:
    """The folders of checkpoints there, hidden ones included."""
    return sorted(p.name for p in (*_all(root), *root.glob(f"{ASIDE}update-*")))


def _read(path: Path) -> Checkpoint:
    written = (path / MANIFEST).read_bytes()
    sums, tensors, state = {}, {}, None
    for name, digest in json.loads(written).items():
        if Path(name).name != name or not (path / name).is_file():
            raise ValueError(f"{name} is no file of it")
        data = (path / name).read_bytes()
        sums[name] = hashlib.sha256(data).hexdigest()
        if sums[name] != digest:
            raise ValueError(f"{name} does not match its checksum")
        if name.endswith(".safetensors"):  # at once: files and tensors together are twice as much
            tensors[name.removesuffix(".safetensors")] = load(data)
        elif name == STATE:
            state = json.loads(data)
    if manifest(sums) != written:
        raise ValueError(f"{MANIFEST} was changed")
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} is a {type(state).__name__}")
    return Checkpoint(path, tensors, state)


def _all(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(root.glob("update-*"), key=_number, reverse=True)


def _number(path: Path) -> int:
    """The update that a folder's name tells; -1 for a name that no run gave."""
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make renames and new names in a folder outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
