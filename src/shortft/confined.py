"""Outputs stay in the folder that the user chose: no link in it leads them elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from shortft.errors import UserError

RUN = (
    ".lock",
    "adapter",
    "best",
    "checkpoints",
    "config.yaml",
    "error.txt",
    "metrics.jsonl",
    "samples",
    "shortcut_check.json",
    "tensorboard",
)
"""What a training run writes, directly in its folder."""
COMPARISON = ("prompts", "runs", "search")
"""What a comparison writes into; its reports replace a link of their name."""


def refuse_links(output_dir: Path, names: Iterable[str]) -> None:
    """Look for symbolic links of these names in a folder, and anywhere below them.

    The folder itself may be one: the user named it.

    Raises:
        UserError: naming the first link.
    """
    for name in names:
        top = output_dir / name
        below = (Path(at) / n for at, folders, files in os.walk(top) for n in (*folders, *files))
        for path in (top, *([] if top.is_symlink() else below)):
            if path.is_symlink():
                raise UserError(
                    f"--output-dir {output_dir}: {path} is a link to {path.readlink()}, and what "
                    "is written there would land outside; remove the link, or name another folder"
                )
