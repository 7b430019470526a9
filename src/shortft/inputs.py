"""Checks of what a user passes in (models, files, folders), made before any slow work."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import yaml

from shortft.errors import UserError
from shortft.paths import expand, is_dir, is_file
from shortft.rewards.spec import parse_reward_spec

MAX_PROMPT_CHARS = 2000
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
WEIGHTS = ".safetensors"
# owner/name or owner/name@revision; a leading dot means a local path
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?")


def read_prompts(path: Path, option: str = "--prompts") -> list[str]:
    """Prompts of a UTF-8 text file, one a line, stripped, in order.

    A byte-order mark and Windows line ends are accepted; blank lines and lines that start with
    ``#`` are dropped.

    Raises:
        UserError: the file cannot be read, is not UTF-8, holds no prompt, or has a line of more
            than 2,000 characters.
    """
    prompts = []
    for number, line in enumerate(read_text(path, option).split("\n"), start=1):
        prompt = line.strip()
        if not prompt or prompt.startswith("#"):
            continue
        if len(prompt) > MAX_PROMPT_CHARS:
            raise UserError(
                f"{option} {path}: line {number} has {len(prompt):,} characters; shorten it to "
                f"{MAX_PROMPT_CHARS:,} or fewer"
            )
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{option} {path}: holds no prompt; write one prompt a line")
    return prompts


def read_text(path: Path, option: str) -> str:
    """A UTF-8 file's text with plain line ends, no byte-order mark; raises `UserError`."""
    name = f"{option} {path}".strip()
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: not UTF-8 text (byte {error.start}); save the file as UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name!r:.300}: cannot be read ({reason}); give a text file") from None


def parse_yaml(text: str, name: str) -> dict[str, object]:
    """Settings by name; nothing in the text is run, whatever its tags say.

    Raises:
        UserError: not YAML, not a mapping, or more than lists and mappings of plain values.
    """
    try:
        values = yaml.safe_load(text)
    except RecursionError:
        raise UserError(f"{name}: not valid YAML: too many brackets") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{name}: not valid YAML{place}: {problem}") from None
    if values is None:  # an empty file, or comments only
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{name}: not a mapping; write one setting a line, such as 'rank: 32'")
    several = (dict, list, set, tuple)
    for key, value in values.items():
        # Aliases of aliases would make the message about them endless.
        inside = value.values() if isinstance(value, dict) else value
        if isinstance(value, several) and any(isinstance(part, several) for part in inside):
            raise UserError(f"{name}: {str(key)[:80]!r} is nested; write plain values")
    return values


def check_model_source(option: str, value: str, embedded: str) -> str:
    """Return `value` if it names the embedded model, a directory, a weights file, or a hub id.

    Raises:
        UserError: if it does not.
    """
    path = Path(value)
    if path.suffix in PICKLES and not is_dir(path):
        raise UserError(
            f"{option} {value}: is a pickle, which may run code, and is not read; give a "
            ".safetensors file"
        )
    if value == embedded or (is_file(path) and path.suffix == WEIGHTS):
        return value
    return check_place(option, value, f"{embedded!r}, a directory, a {WEIGHTS} file")


def check_place(option: str, value: str, others: str = "a directory") -> str:
    """Return `value` if it names a directory or a hub id; `others` stands in the message.

    Raises:
        UserError: if it does not.
    """
    path = Path(value)
    if is_dir(path) or (_HUB_ID.fullmatch(value) and path.suffix != WEIGHTS):
        return value
    raise UserError(
        f"{option} {value or repr(value)}: no such model; give {others} or a hub id such as "
        "owner/name"
    )


def check_reward(spec: str, option: str = "--reward") -> str:
    """Return `spec` if it names known rewards with valid weights."""
    try:
        parse_reward_spec(spec)
    except UserError as error:
        told = str(error).removeprefix("--reward ")
        raise UserError(f"{option} {told}") from None
    return spec


def check_output_file(option: str, path: Path) -> Path:
    """Return `path`, its ``~`` expanded, if it is or can become a file; its folder is made."""
    if is_dir(path):
        raise UserError(f"{option} {path}: is a directory; name a file")
    folder = check_output_dir(option, path.parent)
    make_output_dir(option, folder)
    return folder / path.name


def check_output_dir(option: str, path: Path) -> Path:
    """Return `path`, its ``~`` expanded, if it is or can become a directory."""
    try:
        path = expand(path)
        if "\0" in str(path):
            raise ValueError("a NUL in its name")
        for place in (path, *path.parents):
            if place.exists():
                if not place.is_dir():
                    raise UserError(f"{option} {path}: {place} is a file; give a directory")
                break
    except (OSError, ValueError) as error:  # too long, or a NUL
        shown = repr(str(path))[:80]
        raise UserError(f"{option} {shown}: cannot be a directory ({error})"[:300]) from None
    return path


def make_output_dir(option: str, path: Path) -> None:
    """Make a directory and try to write into it, before any slow work is done for it.

    Raises:
        UserError: if the disk refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(
            f"{option} {path}: cannot be written ({error.strerror}); mend it, or name another "
            "directory"
        ) from None
