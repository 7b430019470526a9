"""Imports point one way: schedule ← plans ← chain ← step ← train; rewards know no models."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import shortft

SOURCE = Path(shortft.__file__).parent

# What each module may import of the package; a folder stands for all of its files.
ALLOWED = {
    "errors": set(),
    "paths": set(),
    "seeds": set(),
    "quiet": set(),
    "memory": set(),
    "schedule": set(),
    "checkpoint": {"errors"},
    "inputs": {"errors", "rewards", "paths"},
    "assets": {"errors", "inputs"},
    "shortcuts": {"assets", "errors", "paths", "weights_file"},
    "weights_file": {"errors"},
    "guard": set(),
    "ema": set(),
    "interrupts": {"errors"},
    "methods": {"errors", "plans", "schedule"},
    "plans": {"schedule"},
    "chain": {"plans", "schedule"},
    "metrics": set(),
    "rewards": {"assets", "errors", "inputs", "paths", "quiet", "weights_file"},
    "families": {"assets", "errors", "paths", "quiet", "schedule"},
    "lora_layers": set(),
    "networks": {"families", "lora_layers", "plans"},
    "adapter": {
        "assets",
        "errors",
        "inputs",
        "networks",
        "paths",
        "plans",
        "quiet",
        "schedule",
        "weights_file",
    },
    "judge": {"errors", "out_of_memory", "rewards"},
    "lock": {"errors"},
    "step": {
        "chain",
        "errors",
        "families",
        "judge",
        "networks",
        "out_of_memory",
        "plans",
        "rewards",
        "schedule",
        "seeds",
    },
}

# The files of a comparison, each before those that may import it.
COMPARE = ["spec", "jobs", "runs", "evaluation", "figures", "charts", "report", "command"]


def imported(text: str, package: str = "shortft") -> set[str]:
    """The package's modules that a file imports, however it spells that."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not spelled here"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    inside = [name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}.")]
    return {name.split(".")[0] for name in inside}


def test_every_spelling_of_an_import_is_seen():
    for text in (
        "from shortft.step import Batch",
        "from shortft import step",
        "def f():\n    import shortft.step",
        "import os, shortft.step as s",
    ):
        assert imported(text) == {"step"}
    assert not imported("import shortftx.step\nfrom pathlib import Path\nimport shortft")


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_module_imports_only_what_lies_before_it(name: str):
    place = SOURCE / name
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    for file in files:
        assert imported(file.read_text()) - {name} <= ALLOWED[name], file


def test_comparisons_import_one_way():
    text = {file.stem: file.read_text() for file in (SOURCE / "compare").glob("*.py")}
    assert set(text) == {"__init__", *COMPARE}
    for i, name in enumerate(COMPARE):
        assert imported(text[name], "shortft.compare") <= set(COMPARE[:i]), name
    assert not imported(text["__init__"])


def test_nothing_before_the_trainer_knows_it():
    for file in SOURCE.rglob("*.py"):
        if imported(file.read_text()) & {"train", "trainer"}:
            assert file.stem in {
                "cli",
                "train",
                "watch",
                "kept",
                "plan_view",
                "demo",
                "faithful",
            }, file
