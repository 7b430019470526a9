"""Checkpoints that are whole or absent: safetensors and JSON, verified before they are used.

A checkpoint is written into a temporary folder, every file synced, a SHA-256 manifest last; then
the folder is renamed, and only after that are old ones deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from shortft.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.json"


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
    """Write a checkpoint, then delete all but the newest `keep` and what crashes left behind."""
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"update-{update:06d}"
    scratch = root / f".{final.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    files = {
        f"{name}.safetensors": save({k: v.detach().cpu().contiguous() for k, v in group.items()})
        for name, group in tensors.items()
    }
    files[STATE] = json.dumps(dict(state), indent=2).encode()
    files[MANIFEST] = json.dumps(
        {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}, indent=2
    ).encode()
    for name, data in files.items():
        _write_synced(scratch / name, data)
    _sync_folder(scratch)
    # Later ones were passed over as damaged when this run went back to before them.
    later = [path for path in _all(root) if path.name >= final.name]
    aside = [path.rename(root / f".old-{path.name}") for path in later]
    scratch.rename(final)
    _sync_folder(root)
    for old in (*aside, *_all(root)[keep:], *root.glob(".update-*"), *root.glob(".old-*")):
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_latest(root: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole.

    Returns:
        It, and one line for each newer one that was damaged and passed over.

    Raises:
        UserError: if there is none.
    """
    problems: list[str] = []
    for path in _all(root):
        try:
            return _read(path), problems
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{path}: damaged ({error}); using the one before it")
    found = f" ({problems[0]})" if problems else ""
    raise UserError(
        f"--resume: no usable checkpoint in {root}{found}; start without --resume, or name the "
        "run's folder by --output-dir"
    )


def _read(path: Path) -> Checkpoint:
    manifest = json.loads((path / MANIFEST).read_bytes())
    files = {}
    for name, digest in manifest.items():
        data = (path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{name} does not match its checksum")
        files[name] = data
    tensors = {
        name.removesuffix(".safetensors"): load(data)
        for name, data in files.items()
        if name.endswith(".safetensors")
    }
    return Checkpoint(path, tensors, json.loads(files[STATE]))


def _all(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(root.glob("update-*"), reverse=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
