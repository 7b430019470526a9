"""Imports point one way: schedule ← plans ← chain ← step ← train; rewards know no models."""

from __future__ import annotations

import ast
import re
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
    "adapter": {"errors", "networks", "plans", "quiet", "schedule", "weights_file"},
    "judge": {"errors", "rewards"},
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


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shortft."):
            found.add((node.module or "").split(".")[1])
    return found


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_module_imports_only_what_lies_before_it(name: str):
    place = SOURCE / name
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    for file in files:
        assert imported(file) - {name} <= ALLOWED[name], file


def test_comparisons_import_one_way():
    text = {file.stem: file.read_text() for file in (SOURCE / "compare").glob("*.py")}
    assert set(text) == {"__init__", *COMPARE}
    for i, name in enumerate(COMPARE):
        found = set(re.findall(r"from shortft\.compare\.(\w+) import", text[name]))
        assert found <= set(COMPARE[:i]), name
    assert not imported(SOURCE / "compare" / "__init__.py")


def test_nothing_before_the_trainer_knows_it():
    for file in SOURCE.rglob("*.py"):
        if imported(file) & {"train", "trainer"}:
            assert file.stem in {
                "cli",
                "train",
                "watch",
                "kept",
                "plan_view",
                "demo",
                "faithful",
            }, file
