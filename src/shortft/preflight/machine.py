"""This machine: devices, memory, disks, and the hub's cache."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Device:
    """Where networks would run.

    Attributes:
        kind: "cuda" or "cpu".
        name: of the device.
        total: bytes of memory.
        bf16: whether it computes in bf16.
    """

    kind: str
    name: str
    total: int
    bf16: bool


def devices() -> list[Device]:
    """All GPUs, or the CPU where there is none."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported()
        return [
            Device("cuda", torch.cuda.get_device_name(i), _gpu_bytes(i), bf16)
            for i in range(torch.cuda.device_count())
        ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [Device("cpu", f"CPU, {cores} cores", main_memory(), bf16=True)]


def main_memory() -> int:
    """Bytes of main memory, those of the container where one is set."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return total


def free_disk(path: Path) -> int:
    """Free bytes where `path` is or would be made."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(place).free


def hub_cache() -> Path:
    """Where downloads of the hub are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def hub_is_off() -> bool:
    """Whether HF_HUB_OFFLINE forbids downloads."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _gpu_bytes(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).total_memory)
