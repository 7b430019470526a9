"""The number format that a run computes in, where none is given."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from shortft.cli import main
from shortft.config import Config, load_config
from shortft.precision import own_precision, settled
from shortft.preflight import machine
from shortft.train import remarks, train
from shortft.trainer import Trainer


def seconds_of_a_convolution(dtype: torch.dtype) -> float:
    x = torch.randn(2, 64, 32, 32).to(dtype)
    weight = torch.randn(64, 64, 3, 3).to(dtype)
    taken = []
    for _ in range(4):  # the first one warms up
        began = time.monotonic()
        torch.nn.functional.conv2d(x, weight, padding=1)
        taken.append(time.monotonic() - began)
    return min(taken[1:])


def knows_bf16(monkeypatch: pytest.MonkeyPatch, knows: bool) -> None:
    cpu = machine.Device("cpu", "CPU, 2 cores", 2**34, bf16=knows)
    monkeypatch.setattr(machine, "devices", lambda: [cpu])


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the CPU")
def test_this_machines_own_format_is_never_the_slow_one():
    """By a convolution's time: imitated bf16 takes some 70 times as long as fp32."""
    taken = {
        name: seconds_of_a_convolution(dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    assert taken[own_precision()] < 4 * min(taken.values())


@pytest.mark.parametrize(
    ("capabilities", "bf16"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "l2_cache_size": 524288}, False),
    ],
)
def test_the_cpu_is_asked_for_its_instructions(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], bf16: bool
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert machine.cpu_computes_bf16() == bf16
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions of torch
    asked = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: bf16)
    monkeypatch.setattr(torch.ops, "mkldnn", asked)
    assert machine.cpu_computes_bf16() == bf16


def test_a_run_records_the_format_and_keeps_it_elsewhere(settings, monkeypatch: pytest.MonkeyPatch):
    auto = settings | {"precision": "auto", "sample_every": 0}
    knows_bf16(monkeypatch, False)
    config = Config(**{**auto, "updates": 2, "checkpoint_every": 1})
    adapter = train(config)
    kept = config.output_dir / "config.yaml"
    assert load_config(kept).precision == "fp32"
    assert '"precision": "fp32"' in (adapter / "adapter.json").read_text()
    knows_bf16(monkeypatch, True)
    assert settled(config).precision == "bf16"
    train(Config(**{**auto, "updates": 3}), resume=True)
    assert load_config(kept).precision == "fp32"


def test_a_format_that_is_given_is_kept_and_a_slow_one_told(
    settings, monkeypatch: pytest.MonkeyPatch
):
    config = Config(**{**settings, "precision": "bf16"})
    for knows, lines in ((True, []), (False, ["--precision bf16: CPU, 2 cores does not compute"])):
        knows_bf16(monkeypatch, knows)
        assert settled(config).precision == "bf16"
        told = [line for line in remarks(Trainer(config)) if "precision" in line]
        assert len(told) == len(lines)
        assert all(line in said for line, said in zip(lines, told, strict=True))


def test_commands_take_auto(monkeypatch: pytest.MonkeyPatch):
    given = {}
    monkeypatch.setattr("shortft.sampling.sample", lambda **options: given.update(options))
    for knows, expected in ((True, "bf16"), (False, "fp32")):
        knows_bf16(monkeypatch, knows)
        assert main(["sample", "--prompt", "a", "--precision", "auto"]) == 0
        assert given["precision"] == expected
