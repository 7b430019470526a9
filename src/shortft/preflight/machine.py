"""This machine: devices, memory, disks, and the hub's cache."""

from __future__ import annotations

import http.client
import os
import platform
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from shortft.redact import without_login

HUB_SECONDS = 3  # to wait for the hub


@dataclass(frozen=True)
class Device:
    """Where networks would run.

    Attributes:
        kind: "cuda" or "cpu".
        name: of the device.
        total: bytes of memory.
        bf16: whether it computes in bf16, rather than imitating it.
        free: asks for the bytes of memory that nothing else holds now; None where that cannot be
            told. Asking a GPU takes some of its memory until the process ends.
    """

    kind: str
    name: str
    total: int
    bf16: bool
    free: Callable[[], int | None] = lambda: None


def devices() -> list[Device]:
    """All GPUs, or the CPU where there is none."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return [
            Device(
                "cuda",
                torch.cuda.get_device_name(i),
                _gpu_bytes(i),
                bf16,
                partial(_free_gpu_bytes, i),
            )
            for i in range(torch.cuda.device_count())
        ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [Device("cpu", f"CPU, {cores} cores", main_memory(), cpu_computes_bf16())]


def cpu_computes_bf16() -> bool:
    """Whether the CPU has instructions for bf16.

    Without AVX-512 either, convolutions in bf16 take 70 times as long as in fp32. Older versions of
    torch tell no more than whether there is AVX-512, which bears bf16.
    """
    tell = getattr(torch.cpu, "get_capabilities", None)
    if tell is not None:
        return any(bool(has) for name, has in tell().items() if name.endswith("bf16"))
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def in_words() -> str:
    """The devices and what computes on them, for beside measurements."""
    found = devices()
    if found[0].kind == "cuda":
        return f"{len(found)} x {found[0].name}"
    return f"{_cpu_name()}: {found[0].name}, {torch.get_num_threads()} threads"


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
    return shutil.disk_usage(_existing(path)).free


def same_disk(first: Path, second: Path) -> bool:
    """Whether two paths are, or would be made, on one disk."""
    return _existing(first).stat().st_dev == _existing(second).stat().st_dev


def hub_cache() -> Path:
    """Where downloads of the hub are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def hub_is_off() -> bool:
    """Whether HF_HUB_OFFLINE forbids downloads."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_answers() -> bool:
    """Whether the hub answers within a few seconds, if with an error."""
    from huggingface_hub import constants

    try:
        with urllib.request.urlopen(without_login(constants.ENDPOINT), timeout=HUB_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _cpu_name() -> str:
    try:
        listed = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        listed = ""
    name = re.search(r"^model name\s*:\s*(.+)$", listed, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def _existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _gpu_bytes(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).total_memory)


def _free_gpu_bytes(index: int) -> int | None:
    try:
        return int(torch.cuda.mem_get_info(index)[0])
    except RuntimeError:  # a device that another process has for itself
        return None


def measure_speed(device: str, precision: str) -> float:
    """Operations per second of networks here: half of what one matrix product reaches."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 8192 if device == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):  # the first one warms up
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.monotonic()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - began)
    return side**3 / best  # a product takes twice as many
