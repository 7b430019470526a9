"""The adapter on disk.

An adapter is a directory: one LoRA file per number in diffusers' own layout, and
``adapter.json`` that says at which timesteps they act.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from shortft.assets import EMBEDDED
from shortft.errors import UserError
from shortft.inputs import check_model_source
from shortft.networks import lora_name
from shortft.paths import exists
from shortft.plans import Placement, parts_for
from shortft.schedule import Cut, Schedule
from shortft.weights_file import check_weights_file, disk_error

if TYPE_CHECKING:
    from shortft.networks import ModelNetworks

FORMAT = 1


@dataclass(frozen=True)
class AdapterInfo:
    """What ``adapter.json`` holds.

    Attributes:
        base_model: what the LoRAs were trained on.
        loras: how many LoRA files there are.
        rank: their rank; alpha equals it.
        segments: parts of the chain.
        placement: where the LoRAs act, see `plans.adapters_at`.
        num_steps: length of the chain in training.
        timesteps: that chain's timesteps at which LoRAs act.
        stacked: how many act at each of them.
        guidance_scale: of the chain in training.
        config: the run's configuration.
        resolution: of the pictures in training; None for the model's own.
        cut_by: how the chain was cut into segments, see `schedule.cut`; None in older adapters,
            which cut flow models' chains by steps and others by time.
        local: models and shortcuts that were files or directories of the machine, as the
            configuration names them.
    """

    base_model: str
    loras: int
    rank: int
    segments: int
    placement: Placement
    num_steps: int
    timesteps: list[int]
    stacked: list[int]
    guidance_scale: float
    config: dict[str, Any]
    resolution: int | None = None
    cut_by: Cut | None = None
    local: list[str] = field(default_factory=list)
    format: int = FORMAT

    def base(self, model: str | None, pipeline: str | None) -> tuple[str, str | None]:
        """Which model to load, and its pipeline's configuration: the given ones, or else its own.

        Raises:
            UserError: if its own is not here any more.
        """
        if model is not None:
            return model, pipeline
        try:
            if self.base_model in self.local and not exists(self.base_model):
                raise UserError("which could be a stranger's on the hub")
            check_model_source("--model", self.base_model, EMBEDDED)
        except UserError:
            raise UserError(
                f"--model: not given, and the adapter's base model {self.base_model} is not here; "
                "give --model"
            ) from None
        return self.base_model, pipeline or self.config.get("pipeline")

    def cut(self, *, flow: bool) -> Cut:
        """How its chain is cut, of a flow model or of another."""
        return self.cut_by or usual_cut(flow=flow)

    def schedule(self, schedule: Schedule) -> Schedule:
        """A schedule of its model, cut as its chain was."""
        return replace(schedule, cut_by=self.cut(flow=schedule.prediction_type == "flow"))

    @property
    def parts(self) -> int:
        """Segments that a chain must have at inference, see `plans.parts_for`."""
        return parts_for(self.placement, self.segments)


def usual_cut(*, flow: bool) -> Cut:
    """How chains were cut before that was written down."""
    return "steps" if flow else "time"


_LORA_FILE = re.compile(r"lora_\d+\.safetensors")


def lora_file(number: int) -> str:
    return f"lora_{number}.safetensors"


def save_adapter(
    nets: ModelNetworks,
    info: AdapterInfo,
    directory: Path,
    states: Mapping[int, dict[str, torch.Tensor]] | None = None,
) -> None:
    """Write all LoRAs and ``adapter.json`` into a directory, all at once.

    They are written beside it and swapped in, so that LoRAs of two adapters never mix; other
    files that lie in the directory stay.

    Args:
        states: weights by LoRA number; those of `nets` if not given.
    """
    scratch = directory.parent / f".{directory.name}.new"
    old = directory.parent / f".{directory.name}.old"
    shutil.rmtree(scratch, ignore_errors=True)
    _put_back(old, directory)  # of a swap that a crash cut short
    scratch.mkdir(parents=True)
    try:
        for number in range(1, nets.loras + 1):
            state = nets.state_of(number) if states is None else states[number]
            nets.family.save_lora(state, scratch / lora_file(number))
        told = json.dumps(asdict(info), indent=2) + "\n"
        (scratch / "adapter.json").write_text(told, encoding="utf-8")
        for file in scratch.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if directory.exists():
            directory.rename(old)
        scratch.rename(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        _put_back(old, directory)
        if isinstance(error, OSError):
            raise
        raise disk_error(error, directory) from error
    _put_back(old, directory)


def _put_back(old: Path, directory: Path) -> None:
    """Undo or finish a swap: the old directory itself, or what others had put into it."""
    if old.exists() and not directory.exists():
        old.rename(directory)
    for other in old.glob("*"):
        if not (directory / other.name).exists() and not _LORA_FILE.fullmatch(other.name):
            other.rename(directory / other.name)
    shutil.rmtree(old, ignore_errors=True)


def read_info(directory: Path) -> AdapterInfo:
    """Read ``adapter.json``.

    Raises:
        UserError: if the directory is not an adapter, a newer format, or a file of it is damaged.
    """
    path = Path(directory) / "adapter.json"
    try:
        text = path.read_text(encoding="utf-8")
        info = TypeAdapter(AdapterInfo).validate_json(text, strict=True)
        if not 1 <= info.loras <= info.segments <= 1000:
            raise ValueError(f"{info.loras} LoRAs for {info.segments} segments")
        if not 1 <= info.num_steps <= 1000:
            raise ValueError(f"{info.num_steps} steps")
    except FileNotFoundError:
        raise UserError(
            f"{directory}: not an adapter (no adapter.json); give the `adapter` directory that "
            "`shortft train` wrote"
        ) from None
    except (ValueError, OSError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False)[0]
            reason = ": ".join([*map(str, first["loc"][:1]), first["msg"]])
        raise UserError(f"{path}: damaged ({reason}); restore it or train again") from error
    if info.format != FORMAT:
        raise UserError(f"{path}: format {info.format} is unknown; update shortft")
    missing = [n for n in range(1, info.loras + 1) if not (directory / lora_file(n)).is_file()]
    if missing:
        raise UserError(f"{directory}: {lora_file(missing[0])} is missing; copy the whole adapter")
    for number in range(1, info.loras + 1):
        file = Path(directory) / lora_file(number)
        check_weights_file(str(file), file, "damaged: copy the adapter again, or train again")
    return info


def load_into(nets: ModelNetworks, directory: Path) -> None:
    """Load an adapter's weights into networks with as many LoRAs of the same rank.

    Raises:
        UserError: if a file is damaged or was made for another architecture.
    """
    from safetensors.torch import load_file

    for number in range(1, nets.loras + 1):
        path = directory / lora_file(number)
        try:
            state = {
                key.removeprefix("unet.").removeprefix("transformer."): value
                for key, value in load_file(path).items()
            }
            copy_state(nets, number, state)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{path}: does not fit {nets.family.source} ({error})") from error


def copy_state(nets: ModelNetworks, number: int, state: dict[str, torch.Tensor]) -> None:
    """Copy saved weights into LoRA `number`, every key accounted for.

    Raises:
        ValueError: if a key is missing, unknown or of another shape.
    """
    own: Sequence[str] = sorted(nets.state_of(number))
    if own != sorted(state):
        raise ValueError(f"LoRA {number}: the saved keys do not match the model's")
    name = lora_name(number)
    parameters = nets.parameters_of(number)
    with torch.no_grad():
        for key, value in state.items():
            target = parameters[key.replace(".weight", f".{name}.weight")]
            if target.shape != value.shape:
                raise ValueError(f"LoRA {number}: {key} is {tuple(value.shape)}")
            target.copy_(value)
