"""Weights shared out over processes: the same updates, and each process keeps a part."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import together
from test_processes import CPUS, config_of, log_of
from torch import nn

from shortft import launcher
from shortft.config import Config, load_config, to_yaml
from shortft.errors import UserError
from shortft.families import load_family
from shortft.families.sharding import ShardedLinear
from shortft.launcher import as_launched, check_split
from shortft.out_of_memory import savings
from shortft.preflight.dry_run import dry_run
from shortft.preflight.machine import Device
from shortft.train import train
from shortft.trainer import Trainer
from test_train import weights, weights_of
from tiny_families import tiny


def linear_numbers(network: nn.Module) -> int:
    return sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))


def two_updates(rank: int, config: Config, out: Path) -> None:
    trainer = Trainer(config)
    figures = [trainer.update()[1] for _ in range(2)]
    linear = [m for m in trainer.family.denoiser.modules() if isinstance(m, nn.Linear)]
    assert all(isinstance(m, ShardedLinear) == config.shard for m in linear)
    report = {
        "figures": [(f.reward, f.grad_norm) for f in figures],
        "numbers": linear_numbers(trainer.family.denoiser),
        "pictures": trainer.pictures()[1],
    }
    torch.save([report, weights_of(trainer)], out / f"rank-{rank}.pt")


def both_ways(size: int, config: Config, folder: Path) -> list[list[Any]]:
    """What every process has, without and with sharing."""
    found = []
    for shared in (False, True):
        out = folder / str(shared)
        out.mkdir(parents=True)
        one = config.model_copy(update={"shard": shared})
        assert together(size, two_updates, one, out) == [0] * size
        found.append([torch.load(f, weights_only=True) for f in sorted(out.glob("*.pt"))])
    return found


def check_alike(size: int, config: Config, folder: Path) -> None:
    """The same figures, pictures and weights, bit for bit, with 1 / size of the numbers."""
    whole, shared = both_ways(size, config, folder)
    start = weights_of(Trainer(config))
    for (one, moved), (two, other) in zip(whole, shared, strict=True):
        assert two["figures"] == one["figures"]
        assert torch.equal(two["pictures"], one["pictures"])
        assert all(torch.equal(other[name], value) for name, value in moved.items())
        assert any(not torch.equal(start[name], value) for name, value in moved.items())
        assert one["numbers"] / size <= two["numbers"] <= 1.05 * one["numbers"] / size


@pytest.mark.parametrize(("size", "recompute"), [(2, False), (3, True)])
def test_shared_weights_make_the_same_updates(settings, tmp_path: Path, size, recompute):
    """Stage 1 runs base, shortcut and policy on the same layers; 3 divides few of their sizes."""
    check_alike(size, config_of(settings, recompute=recompute, batch_size=size), tmp_path)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_of_transformers(settings, tmp_path: Path, name):
    tiny(name).save_pretrained(tmp_path / "model")
    change = {"method": "draft_k", "num_steps": 2, "batch_size": 2, "sample_prompts": 1}
    config = config_of(settings, model=str(tmp_path / "model"), shortcut="none", **change)
    check_alike(2, config, tmp_path / "out")


def test_one_process_keeps_all(settings):
    family = load_family(str(settings["model"]), sharded=True)
    assert not any(isinstance(m, ShardedLinear) for m in family.denoiser.modules())


def whole_run(rank: int, config: Config) -> None:
    train(config)


def test_a_whole_run_with_evaluations_and_a_resume(settings, tmp_path: Path):
    """The first process looks at pictures; the others have to help it."""
    change = {"updates": 4, "sample_every": 2, "checkpoint_every": 2, "ema": 0.9, "guard": "warn"}
    roots = tmp_path / "whole", tmp_path / "shared"
    for root in roots:
        config = config_of(settings, **change, output_dir=root, shard=root.name == "shared")
        assert together(2, whole_run, config.model_copy(update={"updates": 2})) == [0, 0]
        assert together(2, resumed, config) == [0, 0]
    one, two = (weights(root / "adapter") for root in roots)
    assert all(torch.equal(one[name], two[name]) for name in one)
    one_log, two_log = map(log_of, roots)
    for row in (*one_log, *two_log):
        row.pop("at_seconds", None)
    assert one_log == two_log
    assert sum("eval_reward" in row for row in one_log) == 3


def resumed(rank: int, config: Config) -> None:
    train(config, resume=True)


def refused(rank: int, config: Config) -> None:
    """Measured by all alike, the random shortcut is refused by all."""
    with pytest.raises(UserError, match="does not preserve the trajectory"):
        train(config)


def test_all_processes_measure_the_shortcut_together(settings, tmp_path: Path):
    config = config_of(settings, check_shortcut=True, shard=True, output_dir=tmp_path / "out")
    assert together(2, refused, config) == [0, 0]


@pytest.mark.parametrize("other", ["merge", "split_on_out_of_memory"])
def test_what_does_not_go_together_is_told(settings, other):
    with pytest.raises(UserError, match=f"--shard true: cannot be used with --{other[:5]}"):
        config_of(settings, shard=True, **{other: True})


def test_the_launchers_answers_are_read(settings, monkeypatch):
    monkeypatch.setattr(launcher, "_shares", False)
    config = config_of(settings)
    assert not as_launched(config).shard
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for _ in range(2):  # a script may train twice
        assert as_launched(config) == config.model_copy(update={"shard": True})
        assert os.environ["ACCELERATE_USE_FSDP"] == "false"
    with pytest.raises(UserError, match="--no-merge"):
        as_launched(config_of(settings, merge=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(UserError, match="offload"):
        as_launched(config)
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
        with pytest.raises(UserError, match=name):
            as_launched(config)
        monkeypatch.delenv(f"ACCELERATE_USE_{name}")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MIXED_PRECISION", "bf16", "--mixed_precision bf16 is not what --precision fp32 does"),
        ("MIXED_PRECISION", "fp8", "--mixed_precision fp8 .*; use --precision bf16"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "--gradient_accumulation_steps 4 is not"),
        ("DYNAMO_BACKEND", "INDUCTOR", "--dynamo_backend inductor is not supported"),
    ],
)
def test_what_the_launcher_asks_for_is_not_passed_over(
    settings, monkeypatch, variable: str, value: str, message: str
):
    config = config_of(settings)
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(UserError, match=message):
        as_launched(config)


def test_what_the_launcher_asks_for_and_the_run_does_passes(settings, monkeypatch):
    for variable, value in (
        ("MIXED_PRECISION", "bf16"),
        ("GRADIENT_ACCUMULATION_STEPS", "2"),
        ("DYNAMO_BACKEND", "NO"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    config = config_of(settings, precision="bf16", accumulation=2)
    assert as_launched(config).precision == "bf16"


TELLING = """
import os, pathlib
from shortft.families import sharding

gathered = sharding.gathered

def telling(*args):
    pathlib.Path(__file__).with_name(f"rank-{os.environ['RANK']}").touch()
    return gathered(*args)

sharding.gathered = telling

def mirror(images, prompts):
    return -(images - images.flip(-1)).abs().mean(dim=(1, 2, 3))
"""


def test_accelerate_launch_with_fsdp(settings, tmp_path: Path):
    """The documented command, with CPU processes behind it."""
    (tmp_path / "telling.py").write_text(TELLING)
    reward, whole = f"{tmp_path / 'telling.py'}:mirror", tmp_path / "whole"
    config = config_of(settings, updates=2, reward=reward, output_dir=whole)
    assert together(2, whole_run, config) == [0, 0]
    assert not list(tmp_path.glob("rank-*"))
    run = tmp_path / "run.yaml"
    run.write_text(to_yaml(config.model_copy(update={"output_dir": tmp_path / "shared"})))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--use_fsdp"]
    command += ["--num_processes", "2", "--main_process_port", "0"]
    command += ["-m", "shortft", "train", str(run)]
    done = subprocess.run(command, env=CPUS, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("rank-*")) == ["rank-0", "rank-1"]
    one, two = weights(whole / "adapter"), weights(tmp_path / "shared" / "adapter")
    assert all(torch.equal(one[name], two[name]) for name in one)
    # So the run's own file starts it as it was, by any launcher.
    assert load_config(tmp_path / "shared" / "config.yaml").shard


def test_memory_that_runs_out_is_advice_on_every_process(settings, tmp_path: Path):
    config = config_of(settings, shard=True, sample_every=1, output_dir=tmp_path / "run")
    assert together(2, out_of_memory_at_a_look, config) == [0, 0]


def out_of_memory_at_a_look(rank: int, config: Config) -> None:
    def pictures(self: Trainer) -> None:
        raise MemoryError

    Trainer.pictures = pictures  # type: ignore[assignment,method-assign]
    with pytest.raises(UserError, match=r"out of memory.*--recompute"):
        train(config)


def test_what_saves_memory_is_what_the_settings_take(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = config_of(settings, batch_size=8)
    ways = savings(config)
    assert {"--shard", "--accumulation 4"} < ways.keys()
    for other in ({"merge": True}, {"split_on_out_of_memory": True}, {"shard": True}):
        assert "--shard" not in savings(config.model_copy(update=other))
    assert "--encode-ahead" in ways
    of_gpus = {"--reward-device offload", "--optimizer adamw8bit"}
    scored = config.model_copy(update={"reward": "pickscore"})
    assert not of_gpus & savings(scored).keys()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        gpu = Device("cuda", "a GPU", 2**34, bf16=True)
        patch.setattr("shortft.out_of_memory.devices", lambda: [gpu])
        assert "--precision bf16" in savings(config)
        old = dataclasses.replace(gpu, bf16=False)
        patch.setattr("shortft.out_of_memory.devices", lambda: [old])
        assert "--precision bf16" not in savings(config)
        assert of_gpus <= savings(scored).keys()
        assert "--reward-device offload" not in savings(config)  # symmetry has no model
    check_split(config.model_copy(update={"accumulation": 4}), 2)
    with pytest.raises(UserError, match="2 processes × 8 parts; use a multiple of 16"):
        check_split(config.model_copy(update={"accumulation": 8}), 2)
    with pytest.raises(UserError, match="2 processes × 8 parts"):
        dry_run(config.model_copy(update={"accumulation": 8}))
