"""`shortft doctor`: short, complete, and discreet."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from shortft import doctor
from shortft.cli import main
from shortft.preflight import machine
from shortft.recipes import recipe_names


def test_it_tells_what_this_machine_can_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    began = time.process_time()
    assert main(["doctor"]) == 0
    assert time.process_time() - began < 5
    shown = capsys.readouterr().out
    for part in (
        "Python",
        "torch",
        "diffusers",
        "device 0",
        "bf16",
        "hub's cache",
        *recipe_names(),
    ):
        assert part in shown
    assert "hf_secret" not in shown
    assert "HF_HUB_OFFLINE" in shown


def test_a_recipe_that_does_not_fit_is_marked(monkeypatch: pytest.MonkeyPatch):
    device = machine.Device("cuda", "a GPU", 24 * 2**30, bf16=True)
    monkeypatch.setattr(machine, "devices", lambda: [device])
    verdicts = {what: verdict for verdict, what, _ in doctor.recipes()}
    assert verdicts["recipe flux-hps"] == doctor.BAD
    assert verdicts["recipe sdxl-hps-24gb"] == doctor.GOOD


def test_a_torchvision_of_another_build_is_named(tmp_path: Path):
    """In a process of its own, with a torchvision on the path that fails as a wrong build does."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    info = tmp_path / "torchvision-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.0.1\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from shortft import doctor; "
        "print(*doctor.torchvision()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("no torchvision 0.0.1 does not match")
    assert "pip uninstall torchvision" in done.stdout


def test_what_breaks_is_a_line_not_a_traceback():
    def broken() -> list[doctor.Line]:
        raise OSError("the disk\nis gone")

    assert doctor._safely(broken) == [(doctor.BAD, "broken", "OSError: the disk is gone")]


def test_addresses_lose_their_login():
    assert (
        doctor.without_login("https://me:secret@hub.example/x?token=1") == "https://hub.example/x"
    )
