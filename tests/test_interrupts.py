"""Signals stop a run at a safe place, and it goes on as if nothing had been."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import shortft
from conftest import tiny_settings
from shortft.config import Config, load_config, to_yaml
from shortft.errors import Stopped
from shortft.interrupts import Interrupts
from shortft.train import train
from test_train import everything


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # lets Python run the handler


def test_a_signal_waits_while_it_is_held():
    with Interrupts(immediate=True) as interrupts:
        interrupts.hold()
        send(signal.SIGTERM)
        assert interrupts.asked == signal.SIGTERM
        with pytest.raises(Stopped) as stopped:
            interrupts.release()
    assert stopped.value.signal == signal.SIGTERM


def test_a_signal_stops_at_once_elsewhere_and_is_only_noted_with_several_processes():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(immediate=True), pytest.raises(Stopped):
        send(signal.SIGINT)
    with Interrupts(immediate=False) as interrupts:
        send(signal.SIGINT)
        assert interrupts.asked == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


IMPATIENT = """
import os, signal, time
from shortft.interrupts import Interrupts
with Interrupts(immediate=False) as interrupts:
    interrupts.hold()
    for wait in (0, 0, 2.1):  # the second one is the first one's echo
        time.sleep(wait)
        os.kill(os.getpid(), signal.{name})
        print("still here", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_second_signal_exits_at_once(name: str):
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", IMPATIENT.format(name=name)],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": str(Path(shortft.__file__).parents[1])},
    )
    assert process.returncode == -getattr(signal, name)
    assert process.stdout.split("\n").count("still here") == 2
    assert time.monotonic() - began < 40


PLACES = {
    "chain": ("shortft.step", "run_chain"),
    "reward": ("shortft.step", "judge"),
    "backward": ("torch", "autograd.backward"),
    "gradients": ("shortft.step", "average_gradients"),
    "optimizer": ("torch.optim", "AdamW.step"),
    "look": ("shortft.sampling", "Sampler.draw"),
    "scoring": ("shortft.watch", "picture_statistics"),
    "best": ("shortft.kept", "save_adapter"),
    "logging": ("shortft.metrics_log", "MetricsLog.write"),
    "tensorboard": ("torch.utils.tensorboard", "SummaryWriter.add_images"),
    "saving": ("shortft.kept", "save_checkpoint"),
}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("place", "number"),
    [
        *((place, signal.SIGTERM) for place in PLACES),
        ("saving", signal.SIGINT),  # one handler for both
    ],
)
def test_stopped_anywhere_the_run_ends_as_the_uninterrupted_one(
    settings, uninterrupted, monkeypatch: pytest.MonkeyPatch, place: str, number: int
):
    settings |= {"tensorboard": True, "held_out": "compressibility"}
    config = Config(**settings)
    module, path = PLACES[place]
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls, began = getattr(owner, name), [0], []

    def interrupted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == (1 if place == "best" else 2):  # the start is the best there is here
            began.append(time.monotonic())
            send(number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(Stopped) as stopped:
            train(config)
    assert time.monotonic() - began[0] < 30  # with the checkpoint
    assert stopped.value.signal == number
    assert not (config.output_dir / "adapter").exists()
    train(config, resume=True)
    assert everything(config.output_dir) == uninterrupted


@pytest.fixture(scope="module")
def uninterrupted(model, shortcut, tmp_path_factory) -> dict[str, object]:
    """What the same run comes to when nobody stops it."""
    folder = tmp_path_factory.mktemp("whole")
    settings = tiny_settings(model, shortcut, folder)
    settings |= {"tensorboard": True, "held_out": "compressibility"}
    train(Config(**settings))
    return everything(folder / "run")


@pytest.mark.slow
def test_exit_codes_of_the_command(settings, tmp_path: Path):
    config = tmp_path / "run.yaml"
    change = {"updates": 100_000, "checkpoint_every": 0, "sample_every": 0}
    config.write_text(to_yaml(load_config(None, {**settings, **change})))
    command = [sys.executable, "-m", "shortft", "train", str(config)]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        resume = ["--resume"] if number == signal.SIGINT else []
        process = subprocess.Popen([*command, *resume], stderr=subprocess.PIPE, text=True)
        log = Path(str(settings["output_dir"])) / "metrics.jsonl"
        deadline, length = time.monotonic() + 90, log.stat().st_size if log.exists() else 0
        while time.monotonic() < deadline and not (
            log.exists() and log.stat().st_size > length + 300
        ):
            time.sleep(0.1)
        began = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert time.monotonic() - began < 30
        assert "Traceback" not in errors
    assert list((Path(str(settings["output_dir"])) / "checkpoints").glob("update-*"))
