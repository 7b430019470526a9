"""Optimizers: what a checkpoint keeps of them is all that they need to go on."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from shortft.config import Config
from shortft.errors import UserError
from shortft.optimizers import make_optimizer, set_state, state_of


def updated(name: str, updates: int, through_a_file_at: int | None = None) -> list[nn.Parameter]:
    """Two parameters, one large enough for 8 bits, after updates with drawn gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 128), (8, 8)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]

    def make() -> torch.optim.Optimizer:
        groups = [[parameter] for parameter in parameters]
        return make_optimizer(name, groups, learning_rate=1e-2, weight_decay=1e-2)

    optimizer = make()
    for update in range(updates):
        if update == through_a_file_at:
            files = [save(state_of(optimizer, parameter)) for parameter in parameters]
            optimizer = make()
            for parameter, file in zip(parameters, files, strict=True):
                set_state(optimizer, parameter, load(file))
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_going_on_from_a_file_changes_no_bit(name: str):
    for kept, gone_on in zip(updated(name, 4), updated(name, 4, 2), strict=True):
        assert torch.equal(kept, gone_on)
    assert not torch.equal(updated(name, 4)[0], updated(name, 2)[0])


def test_8_bits_are_8_bits_and_go_nearly_the_same_way():
    exact, coarse = updated("adamw", 4)[0], updated("adamw8bit", 4)[0]
    assert 0 < (exact - coarse).abs().max() < 0.01  # of four steps of about 0.01


def test_without_bitsandbytes_the_option_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="--optimizer adamw8bit: bitsandbytes is not installed"):
        Config(optimizer="adamw8bit")
    with pytest.raises(UserError, match="bitsandbytes cannot be used here"):
        updated("adamw8bit", 1)
