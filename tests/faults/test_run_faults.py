"""What can go wrong in the middle of a run: told in one line, and nothing that was done is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import shortft.trainer
from conftest import tiny_settings
from shortft.cli import main
from shortft.config import Config, to_yaml
from shortft.errors import Stopped, Torn, UserError
from shortft.lock import only_one
from shortft.metrics_log import MetricsLog
from shortft.preflight.disk import disk_bytes
from shortft.train import train
from shortft.trainer import Trainer
from test_train import everything, rows


@pytest.fixture(scope="module")
def whole(model, shortcut, tmp_path_factory) -> dict[str, object]:
    """What the run comes to when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    train(Config(**tiny_settings(model, shortcut, folder)))
    return everything(folder / "run")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: unspecified")])
def test_an_update_that_fails_halfway_is_neither_repeated_nor_kept(
    settings, whole, monkeypatch: pytest.MonkeyPatch, split: bool, error: Exception
):
    config = Config(**{**settings, "split_on_out_of_memory": split})
    original, calls = torch.optim.AdamW.step, [0]

    def halfway(self, *args):
        calls[0] += 1
        if calls[0] != 6:
            return original(self, *args)
        groups, self.param_groups = self.param_groups, self.param_groups[:1]
        original(self, *args)  # the first LoRA is changed, the others are not
        self.param_groups = groups
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", halfway)
        with pytest.raises(Torn, match=r"while weights were being changed.* go on by --resume"):
            train(config)
    assert max((config.output_dir / "checkpoints").iterdir()).name == "update-000004"
    assert len(rows(config.output_dir)) == 5
    if split and isinstance(error, MemoryError):  # all end alike, and go on alike
        train(config, resume=True)
        assert everything(config.output_dir) == whole


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        ("shortft.drawing.grids", "save_grid", 2),
        ("shortft.metrics_log.MetricsLog", "write", 2),
        ("shortft.metrics_log.MetricsLog", "write", 5),  # of the update before an evaluation
        ("shortft.kept", "save_adapter", 1),
    ],
)
def test_a_full_disk_anywhere_is_one_line_and_the_run_goes_on(
    settings, whole, monkeypatch, capsys, owner: str, name: str, call: int, tmp_path: Path
):
    config = Config(**settings)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    module, _, kind = owner.rpartition(".")
    place = getattr(__import__(module, fromlist=["x"]), kind)
    original, calls = getattr(place, name), [0]

    def full(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere.png")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        assert main(["train", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: somewhere.png: cannot be written (No space left on device)")
    assert any((config.output_dir / "checkpoints").iterdir())
    train(config, resume=True)
    found = everything(config.output_dir)
    if name == "write":  # that row is lost, and only that
        assert len(found.pop("log")) == len(whole["log"]) - 1  # type: ignore[arg-type]
    assert found == {key: value for key, value in whole.items() if key in found}


def test_a_log_that_fills_the_disk_keeps_whole_lines(small_disk: Path):
    log = MetricsLog(small_disk / "metrics.jsonl", 0, enabled=True)
    for update in range(500):
        log.write({"update": update, "reward": 0.123456789})
    with pytest.raises(OSError, match="No space left"):
        log.write({"update": 500, "note": "x" * 300_000})
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(500))


OWN = """
import torch

class Late:
    calls = 0

    def __call__(self, images, prompts):
        if not images.requires_grad:  # an evaluation
            Late.calls += 1
            if Late.calls == 2:
                {fault}
        return images.mean((1, 2, 3))

late = Late()

def rounded(images, prompts):
    return (images * 255).round().mean((1, 2, 3))

weight = torch.ones((), requires_grad=True)

def blind(images, prompts):
    return weight * images.detach().mean((1, 2, 3))

def in_place(images, prompts):
    return images.mul_(2).mean((1, 2, 3))

def torn(images, prompts):
    scores = images.sigmoid()
    scores[:, 0] += 0.1
    return scores.mean((1, 2, 3))

def chance(images, prompts):
    return (images * torch.rand_like(images)).mean((1, 2, 3))
"""


def test_a_reward_that_fails_at_an_evaluation_is_named(settings, tmp_path: Path):
    """By one of its faults; `test_judge.py` has them all."""
    file = tmp_path / "own.py"
    file.write_text(OWN.format(fault="import time; time.sleep(30)"))
    config = Config(**{**settings, "reward": f"{file}:late", "reward_seconds": 1.0})
    with pytest.raises(UserError, match="took longer than 1 s"):
        train(config)
    file.write_text(OWN.format(fault="pass"))
    with pytest.raises(UserError, match="a reward's file or a local model changed"):
        train(config, resume=True)
    train(config, resume=True, allow_change=True)


def test_a_local_model_that_changed_is_told_on_resume(settings, tmp_path: Path):
    model = shutil.copytree(settings["model"], tmp_path / "own-model")
    config = Config(**{**settings, "model": str(model), "updates": 1})
    train(config)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    longer = config.model_copy(update={"updates": 2})
    with pytest.raises(UserError, match="a reward's file or a local model changed"):
        train(longer, resume=True)
    weights.write_bytes(content)
    train(longer, resume=True)


def test_a_reward_without_any_gradient_is_noticed(settings, tmp_path: Path):
    file = tmp_path / "own.py"
    file.write_text(OWN.format(fault="pass"))
    config = Config(**{**settings, "reward": f"{file}:rounded"})
    with pytest.raises(UserError, match=r"own.py:rounded: 3 updates .* a gradient of exactly 0"):
        train(config)


def test_a_reward_whose_gradient_misses_the_pixels_is_named(settings, tmp_path: Path):
    file = tmp_path / "own.py"
    file.write_text(OWN.format(fault="pass"))
    with pytest.raises(UserError, match=r"own.py:blind: no gradient reaches the pixels"):
        Trainer(Config(**{**settings, "reward": f"{file}:blind"})).update()
    Trainer(Config(**{**settings, "reward": f"{file}:in_place"})).update()  # as it may


def test_a_reward_whose_backward_pass_fails_is_named_and_the_run_can_go_on(settings, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN.format(fault="pass"))
    config = Config(**{**settings, "reward": f"{file}:torn"})
    with pytest.raises(UserError, match=r"own.py:torn: its backward pass raised RuntimeError"):
        train(config)
    assert "modified by an inplace operation" in (config.output_dir / "error.txt").read_text()
    assert any((config.output_dir / "checkpoints").iterdir())


def test_a_reward_that_draws_random_numbers_goes_on_alike(settings, tmp_path: Path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN.format(fault="pass"))
    settings |= {"reward": f"{tmp_path / 'own.py'}:chance"}
    whole, parts = (Config(**{**settings, "output_dir": tmp_path / name}) for name in "ab")
    train(whole)
    step, calls = shortft.trainer.train_step, [0]

    def stopped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 4:
            torch.rand(7)  # somebody else draws as well
            raise Stopped(signal.SIGTERM)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shortft.trainer, "train_step", stopped)
        with pytest.raises(Stopped):
            train(parts)
    torch.manual_seed(99)
    train(parts, resume=True)
    assert everything(whole.output_dir) == everything(parts.output_dir)


def test_out_of_memory_at_an_evaluation_keeps_a_checkpoint_and_advises(settings, monkeypatch):
    config = Config(**{**settings, "updates": 1})

    def ran_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("shortft.trainer.Sampler.draw", ran_out)
        with pytest.raises(UserError, match=r"out of memory .* go on by --resume with --recompute"):
            train(config)
    train(config, resume=True)


@pytest.mark.usefixtures("undrawn")
def test_killed_in_the_first_save_the_same_command_starts_anew(settings, whole):
    config = Config(**settings)
    half = config.output_dir / "checkpoints" / ".update-000002.4242"
    half.mkdir(parents=True)
    (half / "lora_1.safetensors").write_bytes(b"half")
    (config.output_dir / "metrics.jsonl").write_text('{"update": 1, "reward": 0.5}\n{"upd')
    train(config)
    assert everything(config.output_dir) == whole
    assert not half.exists()


def test_two_runs_do_not_share_a_folder(settings):
    config = Config(**{**settings, "updates": 1})
    config.output_dir.mkdir()
    pid = os.fork()
    if pid == 0:
        with only_one(config.output_dir):
            (config.output_dir / "held").touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not (config.output_dir / "held").exists():
            time.sleep(0.01)
        with pytest.raises(UserError, match=rf"another run is writing there \(process {pid}\)"):
            train(config)
    finally:
        os.kill(pid, signal.SIGKILL)  # the lock dies with it
        os.waitpid(pid, 0)
    train(config)


def test_a_run_that_was_continued_elsewhere_meanwhile_is_not_taken_back(settings, monkeypatch):
    """The lock is free again, but what was read before it is old."""
    config = Config(**settings)
    train(config.model_copy(update={"updates": 4}))

    class Slow(Trainer):
        def __init__(self, given: Config) -> None:
            super().__init__(given)
            newest = config.output_dir / "checkpoints" / "update-000004"
            shutil.copytree(newest, newest.with_name("update-000006"))

    monkeypatch.setattr("shortft.train.Trainer", Slow)
    with pytest.raises(UserError, match="another run wrote checkpoints there meanwhile"):
        train(config, resume=True)
    assert (config.output_dir / "checkpoints" / "update-000006").exists()


def test_room_is_asked_for_once(settings, monkeypatch: pytest.MonkeyPatch):
    """A run that goes on has most of its checkpoints on the disk already."""
    config = Config(**settings)
    train(config.model_copy(update={"updates": 4}))
    free = disk_bytes(config, Trainer(config).lora_numbers)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    train(config, resume=True)
    with pytest.raises(UserError, match="checkpoints and adapters take"):
        train(config.model_copy(update={"output_dir": config.output_dir / "new"}))


def test_a_log_that_lost_its_end_is_told(settings, capfd):
    config = Config(**{**settings, "progress": True, "updates": 4})
    train(config.model_copy(update={"updates": 2}))
    log = config.output_dir / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    train(config, resume=True)
    printed = capfd.readouterr()
    assert "bytes are lost, and with them the rows" in " ".join((printed.out + printed.err).split())
    assert [json.loads(line)["update"] for line in log.read_text().splitlines()][-1] == 4
