"""Views, stacked LoRAs and merging against peft's own layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from shortft.errors import UserError
from shortft.families.base import Guidance
from shortft.lora_layers import StackedLinear
from shortft.networks import (
    SHORTCUT,
    ModelNetworks,
    activate,
    fold,
    lora_name,
    stacked_view,
    view,
)
from shortft.optimizers import make_optimizer
from shortft.plans import Step
from shortft.step import change
from test_chain import make_shortcut
from tiny import randomise_loras, tiny_family


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> ModelNetworks:
    family = tiny_family()
    shortcut = make_shortcut(family, tmp_path_factory.mktemp("shortcut") / "s.safetensors")
    nets = ModelNetworks(family, guidance=Guidance(), loras=4, rank=2, shortcut=shortcut)
    randomise_loras(nets)
    return nets


def call(nets: ModelNetworks, module: torch.nn.Module, timestep: int = 501) -> torch.Tensor:
    cond = nets.family.encode(["red apple", "panda face"])
    x = nets.family.noise([1, 2])
    out: torch.Tensor = module(x, timestep, cond.positive, return_dict=False)[0]
    return out


def policy(nets: ModelNetworks, count: int, *, trains: bool = True) -> torch.nn.Module:
    return nets.module(Step(0, 1, "policy", count, trains=trains))


def test_views_hold_no_copy_of_the_base(nets: ModelNetworks):
    base = {p.data_ptr() for p in nets.base.parameters()}
    for step in (Step(0, 1, "shortcut"), *(Step(0, 1, "policy", n) for n in (1, 2, 3, 4))):
        module = nets.module(step)
        held = {p.data_ptr() for name, p in module.named_parameters() if is_weight(name)}
        assert held == base


def is_weight(name: str) -> bool:
    return not any(part in name for part in ("lora_", ".down.", ".up."))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_stacked_layers_equal_peft(nets: ModelNetworks, count: int):
    reference = view(nets._loras)
    names = [lora_name(n) for n in range(1, count + 1)]
    activate(reference, dict.fromkeys(names, 1.0))
    with torch.no_grad():
        expected = call(nets, reference)
        torch.testing.assert_close(call(nets, policy(nets, count)), expected)
        torch.testing.assert_close(call(nets, policy(nets, count, trains=False)), expected)
        assert (expected - call(nets, nets.base)).abs().max() > 1e-3


@pytest.mark.parametrize("merge", [False, True])
def test_loras_on_the_shortcut_equal_peft_with_both(
    nets: ModelNetworks, shortcut: Path, merge: bool
):
    both = ModelNetworks(
        nets.family, guidance=Guidance(), loras=1, rank=2, shortcut=shortcut, merge=merge
    )
    randomise_loras(both)
    reference = view(both._loras)
    nets.family.load_lora(reference, shortcut, SHORTCUT)
    activate(reference, {SHORTCUT: 1.0, lora_name(1): 1.0})
    with torch.no_grad():
        expected = call(both, reference)
        for trains in (True, False):
            module = both.module(Step(0, 1, "shortcut", 1, trains=trains))
            torch.testing.assert_close(call(both, module), expected, atol=1e-5, rtol=1e-5)
        for other in (both.base, policy(both, 1), both.module(Step(0, 1, "shortcut"))):
            assert (expected - call(both, other)).abs().max() > 1e-3


def test_strength_scales_the_loras(nets: ModelNetworks):
    reference = view(nets._loras)
    activate(reference, {lora_name(1): 0.3, lora_name(2): 0.3})
    try:
        with torch.no_grad():
            nets.set_strength(0.3)
            torch.testing.assert_close(call(nets, policy(nets, 2)), call(nets, reference))
            nets.set_strength(0.0)
            torch.testing.assert_close(call(nets, policy(nets, 2)), call(nets, nets.base))
    finally:
        nets.set_strength(1.0)


@pytest.mark.parametrize("merged", [False, True])
def test_frozen_layers_pass_gradient_to_their_input_only(nets: ModelNetworks, merged: bool):
    module = stacked_view(nets.base, nets._loras, [lora_name(1)], frozen=True, merged=merged)
    x = nets.family.noise([1]).requires_grad_()
    cond = nets.family.encode(["red apple"])
    module(x, 501, cond.positive, return_dict=False)[0].sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)
    assert all(p.grad is None for p in nets.parameters_of(1).values())


@pytest.mark.parametrize("optimizer_name", ["adamw", "adamw8bit"])
def test_merged_loras_follow_every_change(nets: ModelNetworks, optimizer_name: str):
    names = [lora_name(1), lora_name(2)]
    branches = stacked_view(nets.base, nets._loras, names, frozen=True)
    merged = stacked_view(nets.base, nets._loras, names, frozen=True, merged=True)
    parameters = list(nets.parameters_of(2).values())
    before = [p.detach().clone() for p in parameters]
    optimizer = make_optimizer(optimizer_name, [parameters], learning_rate=0.1, weight_decay=0.01)
    seen = []
    try:
        for _ in range(2):
            with torch.no_grad():
                seen.append(call(nets, merged))
                torch.testing.assert_close(seen[-1], call(nets, branches), atol=1e-5, rtol=1e-5)
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            change(optimizer)
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
            torch.testing.assert_close(call(nets, merged), seen[0])
    finally:
        optimizer.zero_grad()
    assert not torch.equal(seen[0], seen[1])


def test_merged_shortcut_equals_the_lora_and_leaves_the_base_alone(nets: ModelNetworks):
    assert nets._shortcut is not None
    before = [p.clone() for p in nets.base.parameters()]
    merged = fold(nets._shortcut, SHORTCUT)
    with torch.no_grad():
        torch.testing.assert_close(
            call(nets, merged), call(nets, nets._shortcut), atol=1e-5, rtol=1e-5
        )
    after = list(nets.base.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    touched = {p.data_ptr() for p in merged.parameters()} - {p.data_ptr() for p in after}
    assert touched


def test_new_loras_change_nothing_and_are_seeded():
    family = tiny_family()
    first, second, other = (
        ModelNetworks(family, guidance=Guidance(), loras=2, rank=2, seed=seed) for seed in (7, 7, 8)
    )
    with torch.no_grad():
        torch.testing.assert_close(call(first, policy(first, 2)), call(first, first.base))
    a, b, c = (next(iter(nets.parameters_of(2).values())) for nets in (first, second, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_creating_networks_leaves_the_global_generator_alone():
    family = tiny_family()
    state = torch.random.get_rng_state()
    ModelNetworks(family, guidance=Guidance(), loras=2, rank=2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_train_only(nets: ModelNetworks):
    chosen = nets.train_only([2, 4])
    for number in range(1, 5):
        wanted = number in (2, 4)
        assert all(p.requires_grad == wanted for p in nets.parameters_of(number).values())
    assert len(chosen) == len(nets.parameters_of(2)) + len(nets.parameters_of(4))
    assert not any(p.requires_grad for p in nets.base.parameters())


@pytest.mark.parametrize("content", [None, b"not a safetensors file", b""])
def test_a_bad_shortcut_is_one_clear_error(tmp_path: Path, content: bytes | None):
    path = tmp_path / "shortcut.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"shortcut\.safetensors"):
        ModelNetworks(tiny_family(), guidance=Guidance(), shortcut=path)


def test_a_shortcut_of_another_architecture_is_refused(tmp_path: Path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    key = "unet.down_blocks.9.attentions.0.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 8), f"{key}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, path)
    with pytest.raises(UserError, match="architecture"):
        ModelNetworks(tiny_family(), guidance=Guidance(), shortcut=path)


def test_mixed_precision_keeps_an_input_once_for_all_layers():
    """Query, key and value share it: no copy by way of the LoRAs' fp32. The result is the same."""
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(32, 32, dtype=torch.bfloat16).requires_grad_(False)
    down, up = (torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 32), (32, 4)))
    layer = StackedLinear(base, [down], [up], frozen=False)
    x = torch.randn(16, 32, generator=generator).bfloat16().requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.numel()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        out, _ = layer(x), layer(x)
        inputs = [number for number in kept.values() if number == x.numel()]
        assert len(inputs) == 1
        wide = base(x) + F.linear(F.linear(x.float(), down), up)
    assert torch.equal(out, wide)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(wide.float().square().sum(), x)
    assert torch.equal(gradient, expected)
