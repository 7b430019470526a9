"""Several processes (gloo, on the CPU) do what one does; a lost one breaks nothing.

SHORTFT_ELASTIC=1 adds the slow ones: torchrun that restarts a run of which a process was killed,
and two machines played by two network namespaces.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import together

from shortft import kept
from shortft.config import Config, load_config, to_yaml
from shortft.errors import Stopped, UserError
from shortft.optimizers import state_of
from shortft.train import train
from shortft.trainer import Trainer
from test_train import Harmed, weights, weights_of

elastic = pytest.mark.skipif(
    not os.environ.get("SHORTFT_ELASTIC"), reason="slow: set SHORTFT_ELASTIC=1"
)


def config_of(settings: dict[str, object], **change: Any) -> Config:
    return Config(**{**settings, "sample_every": 0, "checkpoint_every": 0, **change})


def log_of(root: Path) -> list[dict[str, Any]]:
    """A run's log without times and memory."""
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "peak_memory_bytes")} for r in rows]


def update_in_float64(rank: int, config: Config, out: Path) -> None:
    """So precise that what differs is a mistake, not rounding."""
    from tiny import to_float64

    trainer = Trainer(config)
    to_float64(trainer.family, trainer.nets)  # type: ignore[arg-type]
    encode, noise = trainer.family.encode, trainer.family.noise
    trainer.family.encode = lambda prompts: encode(prompts).to(torch.float64)  # type: ignore[method-assign]
    trainer.family.noise = lambda seeds: noise(seeds).double()  # type: ignore[method-assign]
    start = weights_of(trainer)
    figures = [trainer.update()[1] for _ in range(2)]
    moved = {name: value - start[name] for name, value in weights_of(trainer).items()}
    torch.save([[(f.reward, f.grad_norm) for f in figures], moved], out / f"rank-{rank}.pt")


def test_two_and_four_processes_make_the_updates_of_one(settings, tmp_path: Path):
    found = {}
    for size in (1, 2, 4):
        out = tmp_path / str(size)
        out.mkdir()
        assert together(size, update_in_float64, config_of(settings), out) == [0] * size
        found[size] = [torch.load(f, weights_only=True) for f in sorted(out.glob("rank-*.pt"))]
    [(log, moved)] = found[1]
    assert all(float(value.norm()) > 0 for value in moved.values())
    for size in (2, 4):
        assert len(found[size]) == size
        for other_log, other_moved in found[size]:
            torch.testing.assert_close(torch.tensor(other_log), torch.tensor(log))
            for name, value in moved.items():
                off = float((other_moved[name] - value).norm() / value.norm())
                assert off <= 1e-6, (size, name, off)


def moments_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{name}/{key}": value.clone()
        for number in trainer.numbers
        for name, parameter in trainer.nets.parameters_of(number).items()
        for key, value in state_of(trainer.optimizer, parameter).items()
    }


def harmed_on_one(rank: int, config: Config, out: Path) -> None:
    trainer = Trainer(config)
    trainer.update()
    before, moments = weights_of(trainer), moments_of(trainer)
    assert moments
    [(part, weight)] = trainer.reward.parts
    for harm in (
        lambda scores: scores * float("nan"),
        lambda scores: scores.detach() * float("inf") + scores,
        lambda scores: scores + 0 * (scores - scores.detach()).sqrt(),  # only the gradient: NaN
        lambda scores: scores + (scores - scores.detach()).sqrt(),  # and Inf
    ):
        if rank == 1:
            trainer.reward.parts = ((Harmed(part, harm), weight),)
        assert trainer.update()[1].skipped
        assert all(torch.equal(before[name], w) for name, w in weights_of(trainer).items())
        assert all(torch.equal(moments[name], m) for name, m in moments_of(trainer).items())
    assert trainer.counters.skipped == 4
    trainer.reward.parts = ((part, weight),)
    assert not trainer.update()[1].skipped
    torch.save(weights_of(trainer), out / f"rank-{rank}.pt")


def test_what_is_not_finite_on_one_process_is_skipped_on_all(settings, tmp_path: Path):
    assert together(2, harmed_on_one, config_of(settings), tmp_path) == [0, 0]
    one, two = (torch.load(tmp_path / f"rank-{n}.pt", weights_only=True) for n in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)


def train_into_own_folder(rank: int, config: Config) -> None:
    train(config.model_copy(update={"output_dir": config.output_dir / str(rank)}))


def test_only_the_first_process_writes_and_the_log_holds_the_mean_of_all(settings, tmp_path: Path):
    config = config_of(
        settings, updates=3, sample_every=2, tensorboard=True, output_dir=tmp_path / "two"
    )
    assert together(2, train_into_own_folder, config) == [0, 0]
    assert [p.name for p in config.output_dir.iterdir()] == ["0"]
    whole = config.model_copy(update={"output_dir": tmp_path / "one", "tensorboard": False})
    train(whole)
    one, two = log_of(whole.output_dir), log_of(config.output_dir / "0")
    assert [row["update"] for row in two] == [row["update"] for row in one]
    for a, b in zip(one, two, strict=True):
        for key in {"reward", "grad_norm", "eval_reward"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-4)


def train_until(rank: int, config: Config, fault: str) -> None:
    """A fault comes to the second process in its fifth update; the first one writes slowly."""
    original, calls, keep = Trainer.update, [0], kept.keep

    def slowly(*args: Any) -> None:
        time.sleep(0.5)
        keep(*args)

    def update(self: Trainer, **options: Any) -> Any:
        calls[0] += 1
        if rank == 1 and calls[0] == 5:
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "asked": signal.SIGTERM}[fault])
        return original(self, **options)

    if fault != "none":
        Trainer.update = update  # type: ignore[method-assign]
        kept.keep = slowly
    try:
        train(config, auto_resume=True)
    except Stopped as stop:
        # torchrun would end the first process as soon as the second one has left.
        written = (config.output_dir / "checkpoints" / "update-000005").is_dir()
        sys.exit(128 + stop.signal if written else 4)
    except UserError as error:
        sys.exit(2 if "process 0: lost touch with another process" in str(error) else 3)


def test_after_a_process_was_lost_or_stopped_the_run_ends_as_if_nothing_had_been(
    settings, tmp_path: Path
):
    change = {"checkpoint_every": 2, "updates": 6, "ema": 0.9}
    whole = config_of(settings, **change, output_dir=tmp_path / "whole")
    assert together(2, train_until, whole, "none") == [0, 0]
    for fault, codes, at in (("killed", [2, -9], 4), ("asked", [143, 143], 5)):
        config = config_of(settings, **change, output_dir=tmp_path / fault)
        assert together(2, train_until, config, fault) == codes
        newest = max(config.output_dir.glob("checkpoints/update-*"))
        assert newest.name == f"update-{at:06d}"
        assert together(2, train_until, config, "none") == [0, 0]
        assert log_of(config.output_dir) == log_of(whole.output_dir)
        for file in whole.output_dir.glob("checkpoints/update-000006/*.safetensors"):
            again = config.output_dir / file.relative_to(whole.output_dir)
            assert again.read_bytes() == file.read_bytes(), (fault, file.name)


def train_from(rank: int, config: Config) -> None:
    own = config.model_copy(update={"output_dir": config.output_dir / str(rank)})
    with pytest.raises(UserError, match="processes found checkpoints of updates 2, 0"):
        train(own, auto_resume=True)


def test_processes_that_see_different_checkpoints_do_not_start(settings, tmp_path: Path):
    config = config_of(settings, updates=2, output_dir=tmp_path)
    train(config.model_copy(update={"output_dir": tmp_path / "0"}))
    assert together(2, train_from, config) == [0, 0]


DEADLY = """
import os, signal
calls = 0

def deadly(images, prompts):
    global calls
    calls += 1
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and "WHOLE" not in os.environ
    if first and os.environ.get("RANK") == "1" and calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return -(images - images.flip(-1)).abs().mean(dim=(1, 2, 3))
"""
CPUS = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "src", "GLOO_SOCKET_IFNAME": "lo"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@elastic
def test_torchrun_restarts_a_run_whose_process_was_killed(settings, tmp_path: Path):
    (tmp_path / "deadly.py").write_text(DEADLY)
    roots = [tmp_path / name for name in ("whole", "parts")]
    for root, change in zip(roots, ({"WHOLE": "1"}, {}), strict=True):
        config = config_of(
            settings,
            checkpoint_every=2,
            updates=6,
            reward=f"{tmp_path / 'deadly.py'}:deadly",
            output_dir=root,
        )
        file = tmp_path / "run.yaml"
        file.write_text(to_yaml(config))
        # Without --standalone, gloo finds the addresses of the dead after a restart and hangs.
        where = ["--standalone", "--local-addr", "127.0.0.1"]
        where += ["--nproc-per-node", "2", "--max-restarts", "1"]
        command = [*TORCHRUN, *where, "-m", "shortft", "train", str(file), "--auto-resume"]
        done = subprocess.run(
            command, env={**CPUS, **change}, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (weights(root / "adapter") for root in roots)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert log_of(roots[0]) == log_of(roots[1])


NETWORKS = (f"shortft-{os.getpid()}-one", f"shortft-{os.getpid()}-two")


def ip(command: str) -> bool:
    return subprocess.run(["ip", *command.split()], capture_output=True).returncode == 0


@pytest.fixture
def two_networks():
    """Two network namespaces with one cable between them, where the machine allows it."""
    if shutil.which("ip") is None or not ip(f"netns add {NETWORKS[0]}"):
        pytest.skip("may not make network namespaces here")
    try:
        commands = [f"netns add {NETWORKS[1]}"]
        commands += [f"link add cable netns {NETWORKS[0]} type veth peer cable netns {NETWORKS[1]}"]
        for number, name in enumerate(NETWORKS, start=1):
            commands += [f"-n {name} addr add 10.77.0.{number}/24 dev cable"]
            commands += [f"-n {name} link set cable up", f"-n {name} link set lo up"]
        if not all(map(ip, commands)):
            pytest.skip("may not join network namespaces here")
        yield
    finally:
        for name in NETWORKS:
            ip(f"netns del {name}")


def launched_by(launcher: str, rank: int, shard: bool) -> list[str]:
    """The beginning of the command on one of two machines."""
    if launcher == "torchrun":
        return [
            *(*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank)),
            *("--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", "10.77.0.1:29517"),
            *("--local-addr", f"10.77.0.{rank + 1}"),
            *("--rdzv-conf", f"is_host={str(rank == 0).lower()}"),
        ]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        "--use_fsdp" if shard else "--multi_gpu",
        *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
        *("--main_process_ip", "10.77.0.1", "--main_process_port", "29517"),
    ]


@elastic
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("shard", [False, True])
def test_two_machines(settings, tmp_path: Path, two_networks: None, shard: bool, launcher: str):
    # accelerate's --use_fsdp says that the model is shared out, the configuration does not.
    own = shard and launcher == "torchrun"
    config = config_of(settings, updates=3, shard=own, output_dir=tmp_path / "machines")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    launched = []
    for rank, name in enumerate(NETWORKS):
        command = ["ip", "netns", "exec", name, *launched_by(launcher, rank, shard)]
        command += ["-m", "shortft", "train", str(tmp_path / "run.yaml")]
        environment = {**CPUS, "GLOO_SOCKET_IFNAME": "cable"}
        launched.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    for process in launched:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
    assert load_config(config.output_dir / "config.yaml").shard == shard
    here = config.model_copy(update={"output_dir": tmp_path / "here", "shard": False})
    assert together(2, train_until, here, "none") == [0, 0]
    one, two = weights(here.output_dir / "adapter"), weights(config.output_dir / "adapter")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert log_of(here.output_dir) == log_of(config.output_dir)
