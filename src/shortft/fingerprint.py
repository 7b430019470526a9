"""Whether what a run's settings name by path alone is still the same when it goes on."""

from __future__ import annotations

import hashlib
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
PARTS = {".json", ".safetensors", ".bin", ".txt", ".model", ".jinja"}


def fingerprint(config: Config, prompts: Sequence[str], shortcut: Path | None) -> str:
    """SHA-256 of prompts, shortcut, the user's own rewards, and local models (their outlines)."""
    digest = hashlib.sha256("\n".join(prompts).encode())
    digest.update(shortcut.read_bytes() if shortcut else b"")
    names = scorers(config.reward)
    for name in sorted(names):
        if is_file_spec(name):
            digest.update(split_spec(name)[0].read_bytes())
    models = [place.source for place in reward_places(names, config.reward_model).values()]
    if config.model != EMBEDDED:
        models += [config.model, config.pipeline or "", config.decoder or ""]
    for model in models:
        if model and exists(model):
            digest.update(outline(expand(Path(model)), config.output_dir))
    return digest.hexdigest()


def outline(place: Path, output_dir: Path) -> bytes:
    """Names and sizes of a model's files, and their first and last bytes: fast for any size.

    What else lies there does not count: hidden files, which tools keep, and what a run writes.
    """
    digest = hashlib.sha256()
    written = output_dir.resolve()
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        inside = file.relative_to(place)
        if not file.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        if inside.parts and (file.suffix not in PARTS or file.resolve().is_relative_to(written)):
            continue
        size = file.stat().st_size
        digest.update(f"{inside} {size}\n".encode())
        with file.open("rb") as data:
            digest.update(data.read(ENDS))
            data.seek(max(0, size - ENDS))
            digest.update(data.read(ENDS))
    return digest.digest()
