"""Whether what a run's settings name by path alone is still the same when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from shortft.assets import EMBEDDED
from shortft.config import Config
from shortft.paths import exists, expand
from shortft.rewards.own import is_file_spec, split_spec
from shortft.rewards.places import reward_places
from shortft.rewards.spec import scorers

ENDS = 1 << 16  # bytes of a large file's ends that are read
# Of a model's directory, in which other things may lie: weights, configurations, tokenizers.
PARTS = {".json", ".safetensors", ".bin", ".pt", ".pth", ".txt", ".model", ".jinja"}
INDEX = "model_index.json"


def fingerprint(config: Config, prompts: Sequence[str], shortcut: Path | None) -> str:
    """SHA-256 of prompts, shortcut, the user's own rewards, and local models (their outlines)."""
    digest = hashlib.sha256("\n".join(prompts).encode())
    digest.update(shortcut.read_bytes() if shortcut else b"")
    models = _add_files(digest, config, config.reward)
    if config.model != EMBEDDED:
        models += [config.model, config.pipeline or "", config.decoder or ""]
    _add_outlines(digest, config, models)
    return digest.hexdigest()


def held_out_print(config: Config) -> str:
    """SHA-256 of the held-out scorer's own files and local models, if it has any."""
    digest = hashlib.sha256()
    if config.held_out:
        _add_outlines(digest, config, _add_files(digest, config, config.held_out))
    return digest.hexdigest()


def _add_files(digest: hashlib._Hash, config: Config, spec: str) -> list[str]:
    """Add a reward's own files; return where its models lie."""
    names = scorers(spec)
    for name in sorted(names):
        if is_file_spec(name):
            digest.update(split_spec(name)[0].read_bytes())
    return [place.source for place in reward_places(names, config.reward_model).values()]


def _add_outlines(digest: hashlib._Hash, config: Config, models: Sequence[str]) -> None:
    for model in models:
        if model and exists(model):
            digest.update(outline(expand(Path(model)), config.output_dir))


def outline(place: Path, output_dir: Path) -> bytes:
    """Names and sizes of a model's files, and their first and last bytes: fast for any size.

    What else lies there does not count: hidden files, which tools keep, folders that are none of
    the model's, and what a run writes.
    """
    digest = hashlib.sha256()
    written = output_dir.resolve()
    beside = not place.resolve().is_relative_to(written)  # else the model is one of its files
    for file in _files(place) if place.is_dir() else [place]:
        inside = file.relative_to(place)
        if not file.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        if inside.parts and file.suffix not in PARTS:
            continue
        if inside.parts and beside and file.resolve().is_relative_to(written):
            continue
        size = file.stat().st_size
        digest.update(f"{inside} {size}\n".encode())
        with file.open("rb") as data:
            digest.update(data.read(ENDS))
            data.seek(max(0, size - ENDS))
            digest.update(data.read(ENDS))
    return digest.digest()


def _files(folder: Path) -> list[Path]:
    """A model's files: at the top, and in the folders that its index names, or all without one."""
    try:
        parts = set(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        parts = {path.name for path in folder.iterdir()}
    folders = [folder, *(folder / name for name in parts if (folder / name).is_dir())]
    return sorted(file for place in folders for file in place.glob("*"))
