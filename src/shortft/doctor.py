"""`shortft doctor`: what this machine can run. Loads no model; every line stands on its own."""

from __future__ import annotations

import http.client
import importlib.util
import platform
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shortft import __version__
from shortft.drawing.progress import memory_text
from shortft.recipes import MEMORY_GB, recipe_names
from shortft.redact import without_login, without_secrets

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
SECONDS = 3  # to wait for the hub
GOOD, DOUBTFUL, BAD = "ok", "?", "no"
Line = tuple[str, str, str]
"""(verdict, what, found)"""


def doctor() -> int:
    """Print what was found; 0, or 1 where something is broken."""
    console = Console()
    lines: list[Line] = []
    for look in (python, packages, torchvision, devices, disk, hub):
        lines += _safely(look)
    _print(console, lines)
    console.print()
    _print(console, _safely(recipes))
    console.print(
        "\nMemory of recipes is an estimate; `shortft train RECIPE --dry-run` shows its parts.",
        style="dim",
        highlight=False,
    )
    return int(any(verdict == BAD for verdict, _, _ in lines))


def python() -> list[Line]:
    return [(GOOD, "Python", f"{platform.python_version()}, {platform.platform(terse=True)}")]


def versions() -> str:
    """Of this library, Python and the packages that measurements depend on, in one line."""
    found = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    return ", ".join([f"shortft {__version__}", f"Python {platform.python_version()}", *found])


def packages() -> list[Line]:
    lines = []
    for name in PACKAGES:
        try:
            lines.append((GOOD, name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            lines.append((BAD, name, "not installed: pip install -c constraints.txt -e ."))
    return lines


def torchvision() -> list[Line]:
    """A torchvision of another build breaks the import of transformers, diffusers and peft."""
    if importlib.util.find_spec("torchvision") is None:
        return [(GOOD, "torchvision", "absent, and not needed")]
    version = metadata.version("torchvision")
    try:
        import torchvision  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        return [
            (
                BAD,
                "torchvision",
                f"{version} does not match this torch ({reason}), so that transformers and "
                "diffusers fail to import: pip uninstall torchvision",
            )
        ]
    return [(GOOD, "torchvision", f"{version}, matches")]


def devices() -> list[Line]:
    from shortft.preflight import machine

    lines = [
        (
            GOOD,
            f"device {number}",
            f"{device.name}, {memory_text(device.total)}, bf16 {'yes' if device.bf16 else 'no'}",
        )
        for number, device in enumerate(machine.devices())
    ]
    return [*lines, (GOOD, "main memory", memory_text(machine.main_memory()))]


def disk() -> list[Line]:
    from shortft.preflight import machine

    free = machine.free_disk(Path("runs"))
    verdict = GOOD if free >= 10e9 else DOUBTFUL
    return [(verdict, "disk", f"{memory_text(free)} free here")]


def hub() -> list[Line]:
    """Whether the hub answers, and where its cache is; tokens are never shown."""
    from huggingface_hub import constants

    from shortft.preflight import machine

    cache = machine.hub_cache()
    free = memory_text(machine.free_disk(cache))
    lines = [(GOOD, "hub's cache", f"{cache}, {free} free")]
    if machine.hub_is_off():
        return [
            *lines,
            (DOUBTFUL, "hub", "off by HF_HUB_OFFLINE: what is in the cache can be used"),
        ]
    host = without_login(constants.ENDPOINT)
    try:
        with urllib.request.urlopen(host, timeout=SECONDS):
            return [*lines, (GOOD, "hub", f"{host} answers")]
    except urllib.error.HTTPError:  # it answers, if with an error
        return [*lines, (GOOD, "hub", f"{host} answers")]
    except (OSError, ValueError, http.client.HTTPException):
        text = f"{host} does not answer: only local and cached models; `emoji` needs no hub"
        return [*lines, (DOUBTFUL, "hub", text)]


def recipes() -> list[Line]:
    """Which recipes fit the first device."""
    from shortft.preflight import machine

    device = machine.devices()[0]
    lines = []
    for name in recipe_names():
        need = MEMORY_GB[name]
        if need * 1e9 > device.total:
            lines.append((BAD, f"recipe {name}", f"takes about {need:g} GB"))
        elif device.kind == "cpu" and need > 4:
            lines.append(
                (DOUBTFUL, f"recipe {name}", f"about {need:g} GB; very slow without a GPU")
            )
        else:
            lines.append((GOOD, f"recipe {name}", f"about {need:g} GB"))
    return lines


def _safely(look: Callable[[], list[Line]]) -> list[Line]:
    """What `look` finds; what breaks in it is a finding too."""
    try:
        return look()
    except Exception as error:
        reason = without_secrets(" ".join(str(error).split()))[:150]
        return [(BAD, look.__name__, f"{type(error).__name__}: {reason}")]


def _print(console: Console, lines: list[Line]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    styles = {GOOD: "green", DOUBTFUL: "yellow", BAD: "red"}
    for verdict, what, found in lines:
        table.add_row(f"[{styles[verdict]}]{verdict}[/]", what, found)
    console.print(table, highlight=False)
