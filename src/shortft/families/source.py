"""Where a model lies: a directory, a hub id with its revision, or a single file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shortft.assets import model_path
from shortft.errors import UserError
from shortft.paths import exists, is_file


@dataclass(frozen=True)
class Source:
    """A model's place, found but not read.

    Attributes:
        name: as the user wrote it.
        pipeline: directory or hub id in diffusers' layout. Beside a single file it gives the
            configurations, the tokenizers, and the parts that the file lacks.
        revision: commit, tag or branch of a hub id; None for its newest.
        file: the single file of weights; None where `pipeline` holds all of them.
    """

    name: str
    pipeline: str
    revision: str | None = None
    file: Path | None = None


def find_source(model: str, pipeline: str | None = None) -> Source:
    """The place that ``--model`` and ``--pipeline`` name.

    A single file without a configuration takes the ``model_index.json`` beside it, or else the
    published model that diffusers takes files of its layout for.

    Raises:
        UserError: for a configuration without a single file, or a file that cannot be read.
    """
    file = Path(model)
    if not is_file(file):
        if pipeline is not None:
            raise UserError(
                f"--pipeline {pipeline}: is for a single file; {model} has a configuration of its "
                "own, leave it away"
            )
        return Source(model, *_pinned(model))
    if pipeline is None and (file.parent / "model_index.json").is_file():
        pipeline = str(file.parent)
    if pipeline is None:
        from shortft.families.single_file import published_pipeline

        pipeline = published_pipeline(file)
    return Source(model, *_pinned(pipeline), file)


def _pinned(text: str) -> tuple[str, str | None]:
    """A directory or hub id, and the revision that stands behind its ``@``."""
    if "@" in text and not exists(text):
        name, _, revision = text.rpartition("@")
        return name, revision
    return model_path(text), None
