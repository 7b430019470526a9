"""Reading other people's model files: fetched, checked, and never trusted with code."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shortft.errors import UserError
from shortft.quiet import quiet
from shortft.rewards.places import OPTION, Place
from shortft.weights_file import sha256

_log = logging.getLogger(__name__)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
Model = TypeVar("Model", bound=PreTrainedModel)


def find_file(place: Place, filename: str) -> Path:
    """The file `filename` of `place`: given itself, in a directory, or downloaded from the hub."""
    path = Path(place.source)
    if path.is_file():
        return path
    if path.is_dir():
        return path / filename
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(place.source, filename, revision=place.revision))
    except Exception as error:  # the network fails in many ways; each means "not there"
        raise UserError(
            f"{place}: {filename} cannot be fetched ({one_line(error)}); give a local copy: "
            f"{OPTION} {place.reward}=DIRECTORY"
        ) from error


def beside(path: Path, names: tuple[str, ...], hub_id: str) -> str:
    """The directory of `path` if it holds one of the files `names`, else `hub_id`."""
    return str(path.parent) if any((path.parent / name).is_file() for name in names) else hub_id


def read_weights(place: Place, filename: str) -> tuple[dict[str, Any], Path]:
    """A PyTorch file as a dictionary of tensors on the CPU, and where it lies.

    Its SHA-256 is compared with the one that is known: ``place.sha256``, or the name under which
    the hub's cache keeps a large file, which is the checksum that the hub lists for the revision.
    Where a download is not pinned, or its checksum is not known (a cache without links), one
    warning says how to pin this one.

    Raises:
        UserError: missing, of another checksum, damaged, or with code in it.
    """
    path = find_file(place, filename)
    if not path.is_file():
        raise UserError(f"{place}: no file {path.name}; check the path")
    in_cache = path.resolve().name
    expected = place.sha256 or (in_cache if re.fullmatch(r"[0-9a-f]{64}", in_cache) else None)
    unpinned = not place.is_local and (expected is None or not place.is_pinned)
    found = sha256(path) if expected is not None or unpinned else ""
    if expected is not None and found != expected.lower():
        raise UserError(
            f"{place}: SHA-256 of {path.name} is {found}, not {expected}; the file is damaged or "
            "another one: fetch it again"
        )
    if zipfile.is_zipfile(path) and _is_compressed(path):
        raise UserError(
            f"{place}: {path.name} is a compressed archive, which torch.save never writes; "
            "refused, as it may swell without end: give the published file"
        )
    try:
        with warnings.catch_warnings():  # torch comments on how a refused pickle was written
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to run the code.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        code = f" ({named[1]})" if named else ""
        raise UserError(
            f"{place}: {path.name} does not hold weights alone{code}; refused, as it may run code: "
            "give the published file"
        ) from None
    except Exception as error:  # damage shows in many ways, from zip to UTF-8
        raise UserError(
            f"{place}: {path.name} cannot be read ({one_line(error) or 'it ends too early'}); it "
            "is damaged or incomplete: fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{place}: {path.name} holds a {type(content).__name__}, not weights")
    if unpinned:
        cached = path.parent.parent.name == "snapshots"  # …/snapshots/COMMIT/FILE
        commit = path.parent.name if cached else place.revision
        _log.warning(
            f"warning: --reward {place.reward}: {path.name} of {place.source} is a pickle that is "
            f"not pinned or could not be checked; to pin what was loaded now: "
            f"{OPTION} {place.reward}={place.source}@{commit}#{found}"
        )
    return content, path


def _is_compressed(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(
                part.compress_type != zipfile.ZIP_STORED or part.file_size > path.stat().st_size
                for part in archive.infolist()
            )
    except (OSError, ValueError, zipfile.BadZipFile):
        return False  # torch says what is wrong


def build(
    kind: type[Model],
    config: Any,
    state: Mapping[str, Tensor],
    place: Place,
    dtype: torch.dtype,
    **options: Any,
) -> Model:
    """A transformers model with exactly these weights; others in `state` are left alone.

    Raises:
        UserError: a weight is missing or has another shape than `config` wants.
    """
    with torch.device("meta"):
        wanted = kind(config, **options).state_dict()
    for name, weight in wanted.items():
        if name not in state:
            raise UserError(f"{place}: weight {name} is missing; it is of another architecture")
        if state[name].shape != weight.shape:
            raise UserError(
                f"{place}: weight {name} has shape {tuple(state[name].shape)} instead of "
                f"{tuple(weight.shape)}; it is of another architecture"
            )
    weights = {name: state[name].contiguous() for name in wanted}
    with quiet():
        model: Model = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, **options
        )
    return model


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, 200 characters at most."""
    return " ".join(str(error).split())[:200]


def cannot_load(place: Place, error: Exception) -> UserError:
    """What to say when transformers cannot load from `place`."""
    return UserError(
        f"{place}: cannot be loaded ({one_line(error)}); give a directory with the model, its "
        f"tokenizer and preprocessor_config.json: {OPTION} {place.reward}=DIRECTORY"
    )
